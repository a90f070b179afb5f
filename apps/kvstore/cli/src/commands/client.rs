//! The client's commands for whole tables: list, load, dump; and where they find the store.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::program;
use hyv_host::wire::ListenAddr;
use hyv_verbs::{Context, Gid};
use kvstore::client::{Client, ClientConfig, ClientError};

use super::object::InTable;
use crate::format::{self, Format};
use crate::pump::{Loader, Pump};
use crate::session::{self, Connected, Device};
use hyv_lab::values;

#[derive(clap::Args, Debug)]
pub(super) struct Where {
    /// Instance to talk to (default: the only one that runs)
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Talk to the store on another host, by that host's address. The instance here must have an address, too, unless --listen gives one
    #[arg(long, value_name = "ADDR")]
    host: Option<IpAddr>,
    /// Use no instance here but a device of this command's own, with this address of this machine (needs --host)
    #[arg(
        long,
        value_name = "ADDR",
        requires = "host",
        conflicts_with = "instance"
    )]
    listen: Option<ListenAddr>,
    /// Port of the store
    #[arg(long, default_value_t = 7070)]
    port: u16,
    /// How long to wait for the store
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10s")]
    timeout: Duration,
}

impl Where {
    /// Connects.
    pub fn connect(&self) -> Result<Connected> {
        let device = self.device(session::CLIENT_RAM)?;
        let client = self.connect_with(&device, ClientConfig::default())?;
        Ok(Connected::new(client, device))
    }

    /// The device to use, with so many bytes of memory.
    pub fn device(&self, ram: u64) -> Result<Device> {
        match &self.listen {
            Some(address) => Device::own(address, ram),
            None => Device::of(&session::find(self.instance.as_deref())?, ram),
        }
    }

    /// Whether an instance is named, or another host.
    pub const fn names_one(&self) -> bool {
        self.instance.is_some() || self.host.is_some()
    }

    /// Port of the store.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Connects on an open device, as `config` says but for times.
    pub fn connect_by(
        &self,
        context: &Context,
        config: ClientConfig,
    ) -> Result<Client, ClientError> {
        let config = ClientConfig {
            timeout: self.timeout,
            reconnect: Some(self.timeout),
            ..config
        };
        let gid = match self.host.map(|host| host.to_canonical()) {
            None => Gid::LOCAL,
            Some(IpAddr::V4(v4)) => Gid(v4.to_ipv6_mapped().octets()),
            Some(IpAddr::V6(v6)) => Gid(v6.octets()),
        };
        Client::connect_with(context, gid, self.port, config)
    }

    /// The same on a device of [`Self::device`], with what to do if that leads nowhere.
    pub fn connect_with(&self, device: &Device, config: ClientConfig) -> Result<Client> {
        let connected = self.connect_by(&device.context, config);
        let Some(host) = self.host else {
            return Ok(connected?);
        };
        connected.with_context(|| {
            let hint = if self.listen.is_some() {
                ""
            } else {
                " (it must have been started with --listen; or give this command --listen ADDR)"
            };
            format!("cannot reach {host} by {}{hint}", device.whose)
        })
    }
}

#[derive(clap::Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    place: InTable,
}

#[derive(clap::Args, Debug)]
pub(super) struct LoadArgs {
    #[command(flatten)]
    place: InTable,
    /// The file; `-` is standard input
    file: PathBuf,
    /// Its format (default: by its ending, .tsv or .jsonl)
    #[arg(long)]
    format: Option<Format>,
    /// Begin at this line, from 1: where an earlier load ended
    #[arg(long, value_name = "LINE", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from_line: u64,
}

#[derive(clap::Args, Debug)]
pub(super) struct DumpArgs {
    #[command(flatten)]
    place: InTable,
    /// The file; `-` is standard output
    file: PathBuf,
    /// Its format (default: by its ending, .tsv or .jsonl)
    #[arg(long)]
    format: Option<Format>,
}

/// Calls `each` with every key.
fn all_keys(
    client: &mut Client,
    table: u32,
    mut each: impl FnMut(Vec<u8>) -> Result<()>,
) -> Result<()> {
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        let page = client.keys(table, at)?;
        page.keys.into_iter().try_for_each(&mut each)?;
        cursor = page.next;
    }
    Ok(())
}

pub(super) fn list(args: &ListArgs) -> Result<ExitCode> {
    let (mut client, table) = args.place.connect()?;
    let mut out = BufWriter::new(io::stdout().lock());
    all_keys(&mut client, table, |key| {
        out.write_all(&key)?;
        Ok(out.write_all(b"\n")?)
    })?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// How often a line appears where standard error is no terminal.
const LINES_APART: Duration = Duration::from_secs(10);

/// A line on standard error that is written over, if that is a terminal; otherwise a line now and then.
pub(super) struct Progress {
    shown: Instant,
    terminal: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            shown: Instant::now(),
            terminal: io::stderr().is_terminal(),
        }
    }

    pub fn show(&mut self, text: impl FnOnce() -> String) {
        if self.terminal && self.shown.elapsed() > Duration::from_millis(200) {
            self.shown = Instant::now();
            eprint!("\r\x1b[K{}", text());
        } else if !self.terminal && self.shown.elapsed() > LINES_APART {
            self.shown = Instant::now();
            eprintln!("{}", text());
        }
    }

    pub fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

/// A load that came to no good end.
#[derive(Debug)]
pub(super) struct Unfinished {
    /// Records that the store has acknowledged.
    pub stored: u64,
    /// All lines before this one are stored.
    pub resume: u64,
    pub error: anyhow::Error,
}

impl From<Unfinished> for anyhow::Error {
    fn from(load: Unfinished) -> Self {
        let stored = load.stored;
        load.error
            .context(format!("{stored} records were stored, then"))
    }
}

/// What is loaded.
pub(super) struct Source<'a> {
    pub path: &'a Path,
    pub format: Option<Format>,
    /// The first line that counts, from 1.
    pub from_line: u64,
}

/// Loads a file. Gives the records stored; on the first that cannot be, how many were.
pub(super) fn load_file(
    pump: &mut Pump<'_>,
    source: &Source<'_>,
    stop: &Arc<AtomicBool>,
    mut seen: impl FnMut(&[u8], &[u8]),
) -> Result<u64, Unfinished> {
    let path = source.path;
    let nothing = |error: anyhow::Error| Unfinished {
        stored: 0,
        resume: source.from_line,
        error,
    };
    let (mut reader, watch) =
        format::open_watched(path, source.format, stop).map_err(|e| nothing(e.into()))?;
    match reader.skip_to(source.from_line) {
        Ok(true) => {}
        Ok(false) => {
            return Err(nothing(anyhow::anyhow!(
                "{}: has fewer than {} lines",
                path.display(),
                source.from_line
            )));
        }
        Err(e) => return Err(nothing(e.into())),
    }
    let mut record = format::Record {
        line: source.from_line - 1,
        ..format::Record::default()
    };
    let mut progress = Progress::new();
    let start = Instant::now();
    let mut loader = Loader::new(pump);
    let interrupted = |line: u64| {
        Some(anyhow::anyhow!(
            "{}: interrupted before line {}",
            path.display(),
            line + 1
        ))
    };
    // The line in hand is not stored, unless this is said to be the next one.
    let mut next = source.from_line;
    let failed = loop {
        if stop.load(Ordering::Relaxed) {
            break interrupted(record.line);
        }
        let before = record.line;
        match reader.read_into(&mut record) {
            Ok(true) => {}
            Ok(false) => break None,
            // Asked to stop while it waited for more.
            Err(_) if stop.load(Ordering::Relaxed) => break interrupted(before),
            Err(e) => break Some(e.into()),
        }
        next = record.line;
        if let Err(e) = loader.put(&record.key, &record.value, record.line) {
            break Some(anyhow::Error::from(e).context(path.display().to_string()));
        }
        next = record.line + 1;
        seen(&record.key, &record.value);
        progress.show(|| {
            let n = loader.stored();
            let rate = n as f64 / start.elapsed().as_secs_f64();
            format!("loading: {n} records, {rate:.0}/s{}", far(&watch))
        });
    };
    let (stored, failed) = match failed {
        None => match loader.finish() {
            Ok(n) => (n, None),
            Err(e) => (
                loader.drain(),
                Some(anyhow::Error::from(e).context(path.display().to_string())),
            ),
        },
        Some(e) => (loader.drain(), Some(e)),
    };
    progress.end();
    match failed {
        None => Ok(stored),
        Some(error) => Err(Unfinished {
            stored,
            resume: loader.first_missing().map_or(next, |line| line.min(next)),
            error,
        }),
    }
}

/// How far a file has been read.
fn far(watch: &format::Watch) -> String {
    let read = watch.read();
    match watch.total.filter(|t| *t > 0) {
        Some(total) => format!(
            ", {} of {} ({:.0}%)",
            values::bytes(read),
            values::bytes(total),
            read as f64 * 100.0 / total as f64
        ),
        None => format!(", {}", values::bytes(read)),
    }
}

pub(super) fn load(args: &LoadArgs) -> Result<ExitCode> {
    // A missing file or an unknown ending shows before anything is connected.
    drop(if format::is_standard(&args.file) {
        None
    } else {
        Some(format::open(&args.file, args.format)?)
    });
    let stop = program::stop_flag()?;
    let (mut client, table) = args.place.connect()?;
    let start = Instant::now();
    let mut pump = Pump {
        client: &mut client,
        inline: None,
        table,
    };
    let source = Source {
        path: &args.file,
        format: args.format,
        from_line: args.from_line,
    };
    match load_file(&mut pump, &source, &stop, |_, _| {}) {
        Ok(n) => {
            let s = start.elapsed().as_secs_f64();
            eprintln!("{n} records stored in {s:.2} s ({:.0}/s)", n as f64 / s);
            Ok(ExitCode::SUCCESS)
        }
        Err(unfinished) => {
            let resume = unfinished.resume;
            eprintln!(
                "error: {}",
                hyv_host::message::of(&anyhow::Error::from(unfinished))
            );
            if resume > 1 {
                eprintln!(
                    "All records before line {resume} are in the store; go on there with --from-line {resume}."
                );
            }
            Ok(ExitCode::FAILURE)
        }
    }
}

pub(super) fn dump(args: &DumpArgs) -> Result<ExitCode> {
    let stop = program::stop_flag()?;
    let (mut client, table) = args.place.connect()?;
    let tables = client.tables()?;
    let objects = tables
        .iter()
        .find(|t| t.id == table)
        .map_or(0, |t| t.objects);
    let mut out = format::create(&args.file, args.format)?;
    let mut progress = Progress::new();
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        let page = client.keys(table, at)?;
        let mut pump = Pump {
            client: &mut client,
            inline: None,
            table,
        };
        let read = crate::pump::read_all(
            &mut pump,
            page.keys.iter().map(Vec::as_slice),
            |key, value| -> Result<()> {
                if stop.load(Ordering::Relaxed) {
                    bail!("interrupted");
                }
                // A key removed since its page was made is not there any more.
                if let Some(value) = value {
                    out.write(key, value)?;
                }
                Ok(())
            },
        );
        if stop.load(Ordering::Relaxed) {
            progress.end();
            // What was written into a pipe or a device cannot be taken back.
            let left = if out.replaces() {
                format!("{} was not changed", args.file.display())
            } else {
                "what came out is not whole".to_owned()
            };
            bail!(
                "interrupted after {} of {objects} records; {left}; start again for a whole dump",
                out.written(),
            );
        }
        read?;
        progress.show(|| format!("dumping: {} of {objects} records", out.written()));
        cursor = page.next;
    }
    progress.end();
    let n = out.written();
    out.finish()?;
    eprintln!("{n} records written");
    Ok(ExitCode::SUCCESS)
}
