//! `pcap check`: whether what a capture holds is right RoCEv2.

mod report;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use hyv_roce::pcap::analysis::Analysis;
use hyv_roce::pcap::{Decoder, Step};

use report::Report;

/// Bytes read at a time: many packets, and little against a core's cache.
const CHUNK: usize = 1 << 18;

/// Arguments of `pcap`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Verify every ICRC, re-encode every packet and compare, follow PSNs; exit code 1 if anything is wrong
    ///
    /// Reads pcap and pcapng with Ethernet (also VLAN), Linux cooked and raw IP frames, over IPv4 and IPv6. Packets that are not
    /// RoCEv2 are counted and passed over. Findings are errors (a wrong ICRC, other bytes, a cut packet, opcodes out of order, an
    /// answer to what was not sent, PSNs that are answered and not there) or information (loss, retransmissions, duplicates, wraps).
    Check(CheckArgs),
}

/// Arguments of `pcap check`.
#[derive(clap::Args, Debug)]
struct CheckArgs {
    /// The capture (`-`: standard input)
    file: PathBuf,
    /// Write the report as JSON (`-`: standard output, in place of the text)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// List each stream of PSNs
    #[arg(long)]
    streams: bool,
}

/// Runs `pcap`.
///
/// # Errors
/// A file that cannot be read, is no capture, or holds what is wrong (after saying what).
pub fn run(args: &Args) -> Result<ExitCode> {
    let Command::Check(args) = &args.command;
    if let Some(path) = args.json.as_deref()
        && path != Path::new("-")
    {
        crate::perf::check_target(path)?;
    }
    let name = if args.file == Path::new("-") {
        "standard input".to_owned()
    } else {
        args.file.display().to_string()
    };
    let (analysis, broken) = if args.file == Path::new("-") {
        analyse(std::io::stdin().lock())
    } else {
        if args.file.is_dir() {
            bail!("{name} is a folder; name a capture in it");
        }
        let file =
            File::open(&args.file).with_context(|| format!("cannot open the capture {name}"))?;
        analyse(file)
    }
    .with_context(|| name.clone())?;
    let report = Report::new(&name, &analysis, broken.as_deref(), args.streams);
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => report.save(path)?,
        json => {
            report.print()?;
            if let Some(path) = json {
                report.save(path)?;
            }
        }
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Takes a capture apart. What it held before it turned out to be damaged is still worth a report: the second value says what is wrong.
///
/// # Errors
/// Not a capture, or nothing in it can be read.
fn analyse(mut input: impl Read) -> Result<(Analysis, Option<String>)> {
    let mut decoder = Decoder::new();
    let mut analysis = Analysis::new();
    let mut buffer: Vec<u8> = Vec::new();
    let mut taken = 0;
    let mut begun = false;
    let broken = loop {
        match decoder.step(&buffer[taken..]) {
            Ok(Step::Record(record, len)) => {
                analysis.record(&record);
                taken += len;
            }
            Ok(Step::Skip(len)) => {
                begun = true;
                taken += len;
            }
            Ok(Step::Need(need)) => {
                buffer.drain(..taken);
                taken = 0;
                let missing = (need - buffer.len()).max(CHUNK) as u64;
                let read = input
                    .by_ref()
                    .take(missing)
                    .read_to_end(&mut buffer)
                    .context("cannot read it")?;
                if read == 0 {
                    break decoder.end(&buffer, need).err();
                }
            }
            Err(error) => break Some(error),
        }
    };
    match broken {
        Some(error) if !begun => bail!(error),
        broken => {
            analysis.finish();
            let records = analysis.records;
            Ok((
                analysis,
                broken.map(|e| format!("{e}; behind record {records}")),
            ))
        }
    }
}
