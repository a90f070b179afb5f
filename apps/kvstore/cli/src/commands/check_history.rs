//! `kv check-history`: tells whether what clients recorded is linearizable.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use kvstore_check::{History, check};

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Files that clients recorded, of one run; together they are one history
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut history = History::new();
    let mut clients = std::collections::HashMap::new();
    for file in &args.files {
        let summary = history.read_file(file)?;
        if let Some(before) = clients.insert(summary.client, file) {
            bail!(
                "{} and {} are both of client {}: name each file once, and files of one run only",
                before.display(),
                file.display(),
                summary.client
            );
        }
        if !summary.ended {
            eprintln!(
                "{}: client {} was killed; what it had under way counts as unanswered",
                file.display(),
                summary.client
            );
        }
    }
    let report = check(&history);
    for failure in &report.failures {
        eprintln!("error: {failure}");
    }
    let verdict = match report.failures.len() {
        0 => "linearizable".to_owned(),
        n => format!("{n} keys are not"),
    };
    println!(
        "{} operations of {} clients on {} keys, {} unanswered: {verdict}",
        report.operations,
        clients.len(),
        report.keys,
        report.unanswered
    );
    Ok(if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
