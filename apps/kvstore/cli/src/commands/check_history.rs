//! `kv check-history`: tells whether what clients recorded is linearizable.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use kvstore_check::{History, check};

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Files that clients recorded, of one run, or a folder of them (a round of a soak); together they are one history
    #[arg(required = true, value_name = "FILE|FOLDER")]
    files: Vec<PathBuf>,
}

/// The files named, and those in the folders named. What a client left that was killed before it recorded anything is left out.
fn all(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in named {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        let shown = || path.display().to_string();
        for entry in fs::read_dir(path).with_context(shown)? {
            let entry = entry.with_context(shown)?;
            let file = entry.path();
            let is_history = file.extension().is_some_and(|e| e == "hyvh");
            if is_history && entry.metadata().with_context(shown)?.len() > 0 {
                files.push(file);
            }
        }
        if files.len() == before {
            bail!("{}: has no histories (*.hyvh) in it", path.display());
        }
        files[before..].sort();
    }
    Ok(files)
}

/// What was found of keys of which so many are not linearizable, and so many could not be judged.
fn verdict(found: (usize, usize)) -> String {
    match found {
        (0, 0) => "linearizable".to_owned(),
        (wrong, 0) => format!("{wrong} keys are not linearizable"),
        (0, undecided) => format!("{undecided} keys are undecided, none was found to be wrong"),
        (wrong, undecided) => {
            format!("{wrong} keys are not linearizable, {undecided} more are undecided")
        }
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut history = History::new();
    let mut clients = std::collections::HashMap::new();
    for file in &all(&args.files)? {
        let summary = history.read_file(file)?;
        if let Some(before) = clients.insert(summary.client, file.clone()) {
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
    println!(
        "{} operations of {} clients on {} keys, {} unanswered: {}",
        report.operations,
        clients.len(),
        report.keys,
        report.unanswered,
        verdict(report.wrong_and_undecided())
    );
    Ok(if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_undecided_is_not_called_wrong() {
        let said = [(0, 0), (2, 0), (0, 3), (2, 3)].map(super::verdict);
        assert_eq!(
            said,
            [
                "linearizable",
                "2 keys are not linearizable",
                "3 keys are undecided, none was found to be wrong",
                "2 keys are not linearizable, 3 more are undecided",
            ]
        );
    }
}
