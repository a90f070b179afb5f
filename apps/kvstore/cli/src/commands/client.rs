//! The client's commands: put, get, del, list, load, dump, stats.

use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hyv_host::program;
use hyv_verbs::{Context, Gid};
use kvstore::client::{Client, ClientError};

use crate::format::{self, Format};
use crate::pump::{Loader, Pump};
use crate::session;
use hyv_lab::values;

#[derive(clap::Args, Debug)]
pub(super) struct Where {
    /// Instance to talk to (default: the only one that runs)
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Port of the store
    #[arg(long, default_value_t = 7070)]
    port: u16,
    /// How long to wait for the store
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10s")]
    timeout: Duration,
}

impl Where {
    fn connect(&self) -> Result<Client> {
        session::connect(
            &session::find(self.instance.as_deref())?,
            self.port,
            self.timeout,
            "kv",
        )
    }

    /// Whether an instance is named.
    pub const fn names_one(&self) -> bool {
        self.instance.is_some()
    }

    /// The instance that is named.
    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// Port of the store.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Connects on a device that is open.
    pub fn connect_by(&self, context: &Context) -> Result<Client, ClientError> {
        Client::connect(context, Gid::LOCAL, self.port, self.timeout)
    }
}

#[derive(clap::Args, Debug)]
pub(super) struct PutArgs {
    #[command(flatten)]
    place: Where,
    /// The key
    key: String,
    /// The value; `-` reads it from standard input
    value: String,
}

#[derive(clap::Args, Debug)]
pub(super) struct GetArgs {
    #[command(flatten)]
    place: Where,
    /// The key
    key: String,
    /// Print the version too, on standard error
    #[arg(long)]
    version: bool,
}

#[derive(clap::Args, Debug)]
pub(super) struct DelArgs {
    #[command(flatten)]
    place: Where,
    /// The key
    key: String,
}

#[derive(clap::Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    place: Where,
}

#[derive(clap::Args, Debug)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    place: Where,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
pub(super) struct LoadArgs {
    #[command(flatten)]
    place: Where,
    /// The file; `-` is standard input
    file: PathBuf,
    /// Its format (default: by its ending, .tsv or .jsonl)
    #[arg(long)]
    format: Option<Format>,
}

#[derive(clap::Args, Debug)]
pub(super) struct DumpArgs {
    #[command(flatten)]
    place: Where,
    /// The file; `-` is standard output
    file: PathBuf,
    /// Its format (default: by its ending, .tsv or .jsonl)
    #[arg(long)]
    format: Option<Format>,
}

pub(super) fn put(args: &PutArgs) -> Result<ExitCode> {
    let value = if args.value == "-" {
        let mut value = Vec::new();
        // One byte more than fits, so that too much is noticed and not stored cut off.
        io::stdin()
            .take(kvstore::limits::MAX_VALUE_BYTES as u64 + 1)
            .read_to_end(&mut value)?;
        value
    } else {
        args.value.clone().into_bytes()
    };
    args.place.connect()?.put(args.key.as_bytes(), &value)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn get(args: &GetArgs) -> Result<ExitCode> {
    let Some(object) = args.place.connect()?.get(args.key.as_bytes())? else {
        eprintln!("error: no such key: {}", args.key);
        return Ok(ExitCode::FAILURE);
    };
    if args.version {
        eprintln!("version {}", object.version);
    }
    let mut out = io::stdout().lock();
    out.write_all(&object.value)?;
    if out.is_terminal() && !object.value.ends_with(b"\n") {
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn del(args: &DelArgs) -> Result<ExitCode> {
    if args.place.connect()?.del(args.key.as_bytes())?.is_none() {
        eprintln!("error: no such key: {}", args.key);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Calls `each` with every key.
fn all_keys(client: &mut Client, mut each: impl FnMut(Vec<u8>) -> Result<()>) -> Result<()> {
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        let page = client.list(at)?;
        page.keys.into_iter().try_for_each(&mut each)?;
        cursor = page.next;
    }
    Ok(())
}

pub(super) fn list(args: &ListArgs) -> Result<ExitCode> {
    let mut client = args.place.connect()?;
    let mut out = BufWriter::new(io::stdout().lock());
    all_keys(&mut client, |key| {
        out.write_all(&key)?;
        Ok(out.write_all(b"\n")?)
    })?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn stats(args: &StatsArgs) -> Result<ExitCode> {
    let stats = args.place.connect()?.stats()?;
    if args.json {
        let map: serde_json::Map<String, serde_json::Value> = stats
            .fields()
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.into()))
            .collect();
        println!("{}", serde_json::Value::from(map));
    } else {
        for (name, value) in stats.fields() {
            let human = if name.ends_with("_bytes") {
                format!("  ({})", values::bytes(value))
            } else {
                String::new()
            };
            println!("{name:<20} {value}{human}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A line on standard error that is written over, if that is a terminal.
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
        }
    }

    pub fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

/// Loads a file. Gives the records stored; on the first that cannot be, an error that says how many were.
pub(super) fn load_file(
    pump: &mut Pump<'_>,
    path: &std::path::Path,
    format: Option<Format>,
    stop: &AtomicBool,
    mut seen: impl FnMut(&[u8], &[u8]),
) -> Result<u64> {
    let mut reader = format::open(path, format)?;
    let mut record = format::Record::default();
    let mut progress = Progress::new();
    let start = Instant::now();
    let mut loader = Loader::new(pump);
    let failed = loop {
        if stop.load(Ordering::Relaxed) {
            break Some(anyhow::anyhow!(
                "{}: interrupted before line {}",
                path.display(),
                record.line + 1
            ));
        }
        match reader.read_into(&mut record) {
            Ok(true) => {}
            Ok(false) => break None,
            Err(e) => break Some(e.into()),
        }
        if let Err(e) = loader.put(&record.key, &record.value, record.line) {
            break Some(anyhow::Error::from(e).context(path.display().to_string()));
        }
        seen(&record.key, &record.value);
        progress.show(|| {
            let n = loader.stored();
            format!(
                "loading: {n} records, {:.0}/s",
                n as f64 / start.elapsed().as_secs_f64()
            )
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
        Some(e) => Err(e.context(format!("{stored} records were stored, then"))),
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
    let mut client = args.place.connect()?;
    let start = Instant::now();
    let mut pump = Pump {
        client: &mut client,
        inline: None,
    };
    let n = load_file(&mut pump, &args.file, args.format, &stop, |_, _| {})?;
    let s = start.elapsed().as_secs_f64();
    eprintln!("{n} records stored in {s:.2} s ({:.0}/s)", n as f64 / s);
    Ok(ExitCode::SUCCESS)
}

pub(super) fn dump(args: &DumpArgs) -> Result<ExitCode> {
    let stop = program::stop_flag()?;
    let mut client = args.place.connect()?;
    let mut out = format::create(&args.file, args.format)?;
    let mut progress = Progress::new();
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        let page = client.list(at)?;
        let mut pump = Pump {
            client: &mut client,
            inline: None,
        };
        crate::pump::read_all(
            &mut pump,
            page.keys.iter().map(Vec::as_slice),
            |key, value| -> Result<()> {
                // A key removed since its page was made is not there any more.
                if let Some(value) = value {
                    out.write(key, value)?;
                }
                Ok(())
            },
        )?;
        if stop.load(Ordering::Relaxed) {
            progress.end();
            bail!(
                "interrupted after {} records; {} was not changed",
                out.written(),
                args.file.display()
            );
        }
        progress.show(|| format!("dumping: {} records", out.written()));
        cursor = page.next;
    }
    progress.end();
    let n = out.written();
    out.finish()?;
    eprintln!("{n} records written");
    Ok(ExitCode::SUCCESS)
}
