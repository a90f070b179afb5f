//! What the command line says, and what it comes to.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use hyv_host::accel::AccelRequest;
use hyv_host::sys::clock;
use hyv_lab::values;
use kvstore::client::ClientConfig;
use kvstore::limits::MAX_VALUE_BYTES;

use super::RECORD_OVERHEAD;
use super::filled::Instrument;
use crate::bench::limits::{
    DEFAULT_TAIL_UTILISATION, DEFAULT_UTILISATIONS, MAX_CLIENTS, MAX_RECORDS, MAX_UTILISATION,
    OVERWRITE_IN_FLIGHT,
};
use crate::bench::rpc;
use crate::bench::workload::{Choice, Workload, chosen};
use crate::commands::appliance::ModeChoice;
use crate::commands::client::Where;

/// Where the store that is measured runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Place {
    Guest,
    Native,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Switch {
    On,
    Off,
}

/// What it is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Rival {
    Redis,
}

#[derive(clap::Args, Debug)]
pub(in crate::commands) struct Args {
    #[command(flatten)]
    pub(super) place: Where,
    /// Workloads: YCSB's a to f, get-put (reads and writes of some share, uniform), all (a to f); or overwrite alone (writes, uniform,
    /// at several --utilisation) [default: all; get-put beside Redis; c beside a busy cleaner]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(super) workload: Vec<Choice>,
    /// Records in the store [default: 100000, or as many as a running store has room for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RECORDS)))]
    pub(super) records: Option<u32>,
    /// Bytes of a value [default: 1000 (YCSB: ten fields of 100); 100 for get-put]
    #[arg(long, value_name = "SIZE", value_parser = values::size, allow_negative_numbers = true)]
    pub(super) value_size: Option<u64>,
    /// Share of reads in get-put, 0 to 1
    #[arg(long, value_name = "SHARE", default_value = "0.95", value_parser = share, allow_negative_numbers = true)]
    pub(super) read_share: f64,
    /// How long to measure each workload in each place
    #[arg(long = "for", value_name = "TIME", value_parser = values::duration, default_value = "3s", conflicts_with = "operations")]
    pub(super) time: Duration,
    /// Measure so many operations of each workload in each place
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) operations: Option<u64>,
    /// Requests outstanding at once on each connection, 1 to 16 [default: 1; 16 for overwrite]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(super) in_flight: Option<u8>,
    /// Connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CLIENTS)))]
    pub(super) clients: u16,
    /// Measure stores of this command's own: guest, native, or both in alternating slices, with their ratio
    /// [default: the instance that runs; without one, a guest]
    #[arg(
        long = "where",
        value_name = "WHERE",
        value_delimiter = ',',
        conflicts_with_all = ["instance", "host"]
    )]
    pub(super) places: Vec<Place>,
    /// Run the same on the machine's redis-server, in alternating slices with stores of this command's own
    #[arg(long, value_name = "WHAT", conflicts_with_all = ["instance", "host"])]
    pub(super) vs: Option<Rival>,
    /// Also measure the store by one-sided reads, in a place of its own: the client READs hash table and log, and asks the server
    /// only in doubt [default: with --vs]
    #[arg(long)]
    pub(super) one_sided: bool,
    /// Measure reads with the server's cleaner off and with one that never rests, in alternating slices, in a store of this command's
    /// own whose log is filled to --utilisation
    #[arg(long, conflicts_with_all = ["vs", "one_sided", "records", "instance", "host"])]
    pub(super) cleaner_tail: bool,
    /// Per cent of the log that are live: one for --cleaner-tail, for workload overwrite several, of which the first is what the others
    /// are set against and comes again at the end [default: 80 beside a busy cleaner;
    /// 30,80,90 for overwrite]
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_UTILISATION)))]
    pub(super) utilisation: Vec<u8>,
    /// Whether writes execute once, whatever happens to their replies; each then takes a result record in the log
    #[arg(long, value_name = "on|off", default_value = "on", value_enum)]
    pub(super) exactly_once: Switch,
    /// Write a report (`-` or nothing: standard output)
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(super) json: Option<PathBuf>,
    /// Replays the draws of another run [default: another one each time]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    pub(super) accel: AccelRequest,
    /// Memory of a guest of this command's own [default: by the records]
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub(super) memory: Option<u64>,
    /// CPUs to use, for example 0,1: the first for engine and client, the second for the server, a third for the client
    #[arg(long, value_name = "CPUS")]
    pub(super) pin: Option<String>,
    /// Who drives the engine: this process's client (inline) or a thread
    #[arg(long, value_name = "auto|inline|thread", default_value = "auto")]
    pub(super) mode: ModeChoice,
    /// The image to boot
    #[arg(long, value_name = "PATH", env = "HYV_IMAGE", hide_env = true)]
    pub(super) image: Option<PathBuf>,
    /// What to log: error, warn, info, debug or trace, or a filter such as hyv_host=debug
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    pub(super) log: String,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share is a number from 0 to 1, for example 0.95".to_owned()),
    }
}

/// What is measured, after defaults.
pub(super) struct What {
    pub(super) workloads: Vec<Workload>,
    pub(super) value_size: usize,
    pub(super) seed: u64,
    /// Requests under way on each connection.
    pub(super) in_flight: u8,
    pub(super) exactly_once: bool,
    /// A measurement of a store that is filled to some share of its log.
    pub(super) instrument: Option<Instrument>,
    /// Those shares, per cent.
    pub(super) utilisations: Vec<u8>,
}

impl What {
    pub(super) fn of(args: &Args) -> Result<Self> {
        let workloads = if !args.workload.is_empty() {
            chosen(&args.workload)
        } else if args.vs.is_some() {
            vec![Workload::GetPut]
        } else if args.cleaner_tail {
            vec![Workload::C]
        } else {
            Workload::YCSB.to_vec()
        };
        let instrument = Self::instrument(args, &workloads)?;
        let small = [&[Workload::GetPut][..], &[Workload::Overwrite]].contains(&&workloads[..]);
        let default = if small || args.cleaner_tail {
            100
        } else {
            1_000
        };
        let value_size = args.value_size.unwrap_or(default);
        if value_size > MAX_VALUE_BYTES as u64 {
            bail!("--value-size {value_size}: a value has at most {MAX_VALUE_BYTES} bytes");
        }
        Ok(Self {
            workloads,
            value_size: value_size as usize,
            seed: args.seed.unwrap_or_else(|| clock::tsc() >> 8),
            in_flight: args.in_flight.unwrap_or(match instrument {
                Some(Instrument::Overwrite) => OVERWRITE_IN_FLIGHT,
                _ => 1,
            }),
            exactly_once: args.exactly_once == Switch::On,
            instrument,
            utilisations: match (&args.utilisation[..], instrument) {
                ([], Some(Instrument::Overwrite)) => DEFAULT_UTILISATIONS.to_vec(),
                ([], _) => vec![DEFAULT_TAIL_UTILISATION],
                (list, _) => list.to_vec(),
            },
        })
    }

    /// What is measured of a store that is filled to some share, and whether everything else goes with it.
    fn instrument(args: &Args, workloads: &[Workload]) -> Result<Option<Instrument>> {
        if args.cleaner_tail {
            if workloads.len() != 1 || workloads[0].inserts() || workloads[0] == Workload::Overwrite
            {
                bail!("--cleaner-tail: give one --workload of a, b, c, f and get-put");
            }
            if args.utilisation.len() > 1 {
                bail!("--cleaner-tail: give one --utilisation");
            }
            return Ok(Some(Instrument::Tail));
        }
        if workloads.contains(&Workload::Overwrite) {
            if workloads.len() != 1 {
                bail!("--workload overwrite: it is measured by itself");
            }
            let others = [
                ("--vs", args.vs.is_some()),
                ("--one-sided", args.one_sided),
                ("--records", args.records.is_some()),
                ("--instance or --host", args.place.names_one()),
            ];
            if let Some((name, _)) = others.iter().find(|(_, given)| *given) {
                bail!(
                    "--workload overwrite does not go with {name}: it fills a store of its own to a --utilisation"
                );
            }
            return Ok(Some(Instrument::Overwrite));
        }
        if !args.utilisation.is_empty() {
            bail!("--utilisation is for --workload overwrite and for --cleaner-tail");
        }
        Ok(None)
    }

    /// How clients are to be, but for times.
    pub(super) fn client_config(&self) -> ClientConfig {
        ClientConfig {
            exactly_once: self.exactly_once,
            ..ClientConfig::default()
        }
    }

    /// The same for those that read one-sidedly.
    pub(super) fn one_sided_config(&self, records: u32) -> ClientConfig {
        ClientConfig {
            exactly_once: self.exactly_once,
            ..rpc::one_sided_config(records)
        }
    }

    /// Bytes of memory for one record.
    pub(super) const fn record_bytes(&self) -> u64 {
        self.value_size as u64 + RECORD_OVERHEAD
    }
}
