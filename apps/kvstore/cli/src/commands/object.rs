//! The client's commands for one object and for tables: put, get, del, incr, table.

use std::io::{self, IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kvstore::client::{Client, ClientError};
use kvstore::store::{DEFAULT_TABLE, Increment, NEVER, RejectRules};

use super::client::Where;
use crate::session::Connected;
use hyv_lab::values;

/// A table of a store.
#[derive(clap::Args, Debug)]
pub(super) struct InTable {
    #[command(flatten)]
    place: Where,
    /// The table (`kv table create NAME` makes one)
    #[arg(long, value_name = "NAME", default_value = "default")]
    table: String,
}

impl InTable {
    /// Connects; gives the table's id too.
    pub fn connect(&self) -> Result<(Connected, u32)> {
        let mut client = self.place.connect()?;
        let table = find(&mut client, &self.table)?;
        Ok((client, table))
    }
}

fn find(client: &mut Client, name: &str) -> Result<u32> {
    if name == kvstore::store::DEFAULT_TABLE_NAME {
        return Ok(DEFAULT_TABLE);
    }
    client.table(name)?.with_context(|| {
        format!("no table named `{name}`: `kv table list` shows those that exist, `kv table create` makes one")
    })
}

#[derive(clap::Args, Debug)]
pub(super) struct PutArgs {
    #[command(flatten)]
    place: InTable,
    /// The key
    key: String,
    /// The value; `-` reads it from standard input
    value: String,
    /// Gone after so long, for example 10s
    #[arg(long, value_name = "TIME", value_parser = values::duration, conflicts_with = "expires")]
    ttl: Option<Duration>,
    /// Gone from this time on, in seconds since 1970
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=u64::MAX / 1_000_000_000))]
    expires: Option<u64>,
    /// Only if there is no such key
    #[arg(long, conflicts_with = "if_version")]
    if_absent: bool,
    /// Only if the object has this version
    #[arg(long, value_name = "VERSION")]
    if_version: Option<u64>,
}

#[derive(clap::Args, Debug)]
pub(super) struct GetArgs {
    #[command(flatten)]
    place: InTable,
    /// The key
    key: String,
    /// Print the version too, on standard error
    #[arg(long)]
    version: bool,
}

#[derive(clap::Args, Debug)]
pub(super) struct DelArgs {
    #[command(flatten)]
    place: InTable,
    /// The key
    key: String,
    /// Only if the object has this version
    #[arg(long, value_name = "VERSION")]
    if_version: Option<u64>,
}

#[derive(clap::Args, Debug)]
pub(super) struct IncrArgs {
    #[command(flatten)]
    place: InTable,
    /// The key; a number that does not exist counts as 0
    key: String,
    /// What to add: an integer, or with a decimal point a floating-point number; 0 shows the number
    #[arg(default_value = "1", allow_negative_numbers = true, value_parser = number)]
    by: Increment,
    /// Only if the object has this version
    #[arg(long, value_name = "VERSION")]
    if_version: Option<u64>,
}

#[derive(clap::Args, Debug)]
pub(super) struct TableArgs {
    #[command(subcommand)]
    command: TableCommand,
}

#[derive(clap::Subcommand, Debug)]
enum TableCommand {
    /// Make a table
    Create {
        #[command(flatten)]
        place: Where,
        /// Its name
        name: String,
    },
    /// Remove a table with everything in it
    Drop {
        #[command(flatten)]
        place: Where,
        /// Its name
        name: String,
    },
    /// Print all tables: name, objects, bytes
    List {
        #[command(flatten)]
        place: Where,
    },
}

/// What `kv incr` adds.
fn number(text: &str) -> Result<Increment, String> {
    if let Ok(n) = text.parse() {
        return Ok(Increment::I64(n));
    }
    match text.parse::<f64>() {
        Ok(n) if n.is_finite() && text.contains(['.', 'e', 'E']) => Ok(Increment::F64(n)),
        _ => Err("neither an integer of 64 bits nor a number with a decimal point".to_owned()),
    }
}

fn only_version(version: Option<u64>) -> RejectRules {
    version.map_or(RejectRules::NONE, RejectRules::unless_version)
}

/// ns since 1970, by the server's clock.
fn expiry(client: &Client, args: &PutArgs) -> Result<u64> {
    let now = client.server_time();
    match (args.ttl, args.expires) {
        (Some(ttl), _) => {
            let ns = u64::try_from(ttl.as_nanos()).ok().filter(|ns| *ns > 0);
            ns.and_then(|ns| now.checked_add(ns))
                .context("--ttl: not a time that an object can live for")
        }
        (None, Some(seconds)) => {
            let ns = seconds * 1_000_000_000;
            if ns <= now {
                bail!(
                    "--expires {seconds} is over: the store's clock says {}",
                    now / 1_000_000_000
                );
            }
            Ok(ns)
        }
        (None, None) => Ok(NEVER),
    }
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
    let (mut client, table) = args.place.connect()?;
    let rules = if args.if_absent {
        RejectRules::EXISTS
    } else {
        only_version(args.if_version)
    };
    let expires = expiry(&client, args)?;
    client
        .write_if(table, args.key.as_bytes(), &value, rules, expires)
        .map_err(|e| not_done(e, &args.key))?;
    Ok(ExitCode::SUCCESS)
}

/// Says of a refusal which key it is about.
fn not_done(error: ClientError, key: &str) -> anyhow::Error {
    let refused = matches!(
        error,
        ClientError::Rejected { .. } | ClientError::Status { .. }
    );
    let error = anyhow::Error::from(error);
    if refused {
        error.context(format!("{key}: nothing was changed"))
    } else {
        error
    }
}

pub(super) fn get(args: &GetArgs) -> Result<ExitCode> {
    let (mut client, table) = args.place.connect()?;
    let Some(object) = client.read(table, args.key.as_bytes())? else {
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
    let (mut client, table) = args.place.connect()?;
    let removed = client
        .remove_if(table, args.key.as_bytes(), only_version(args.if_version))
        .map_err(|e| not_done(e, &args.key))?;
    if removed.is_none() {
        eprintln!("error: no such key: {}", args.key);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// The integer that a value must be if it is a number of 8 bytes: those of an integer below 2^52, or of a negative one, make no
/// floating-point number that anybody counts with.
fn surely_integer(value: &[u8]) -> Option<i64> {
    let bytes = *value.as_array()?;
    let float = f64::from_le_bytes(bytes);
    (float.is_subnormal() || float.is_nan()).then(|| i64::from_le_bytes(bytes))
}

pub(super) fn incr(args: &IncrArgs) -> Result<ExitCode> {
    let (mut client, table) = args.place.connect()?;
    // The store adds what it is told to add; a slip here would end a counter.
    if matches!(args.by, Increment::F64(_))
        && let Some(object) = client.read(table, args.key.as_bytes())?
        && let Some(n) = surely_integer(&object.value)
    {
        bail!(
            "{} holds the integer {n}: give BY without a decimal point",
            args.key
        );
    }
    let done = client
        .increment_if(
            table,
            args.key.as_bytes(),
            args.by,
            only_version(args.if_version),
        )
        .map_err(|e| not_done(e, &args.key))?;
    match done.value {
        Increment::I64(n) => println!("{n}"),
        Increment::F64(n) => println!("{n:?}"),
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn table(args: &TableArgs) -> Result<ExitCode> {
    match &args.command {
        TableCommand::Create { place, name } => {
            let (_, created) = place.connect()?.create_table(name)?;
            if !created {
                bail!("there is a table named `{name}` already");
            }
        }
        TableCommand::Drop { place, name } => {
            let mut client = place.connect()?;
            let table = find(&mut client, name)?;
            client.drop_table(table)?;
        }
        TableCommand::List { place } => {
            let mut out = io::stdout().lock();
            for table in place.connect()?.tables()? {
                writeln!(
                    out,
                    "{}\t{}\t{}",
                    table.name, table.objects, table.live_bytes
                )?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_from_floating_point_numbers() {
        for n in [1, -1, 5_000_000, i64::MIN + 1, (1 << 52) - 1] {
            assert_eq!(surely_integer(&n.to_le_bytes()), Some(n), "{n}");
        }
        for x in [0.0, -0.0, 0.5, -2.5, 1e300, f64::MIN_POSITIVE] {
            assert_eq!(surely_integer(&x.to_le_bytes()), None, "{x}");
        }
        assert_eq!(surely_integer(b"1"), None);
    }

    #[test]
    fn what_is_added_is_an_integer_unless_it_has_a_point() {
        assert_eq!(number("-3"), Ok(Increment::I64(-3)));
        assert_eq!(number("2.5"), Ok(Increment::F64(2.5)));
        assert_eq!(number("1e3"), Ok(Increment::F64(1000.0)));
        for wrong in ["", "x", "nan", "inf", "9223372036854775808", "1e999"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }
}
