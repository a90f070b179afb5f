//! `kv bench`: workloads on a store: one that runs, or a guest of its own, a native server beside it, and Redis.

mod args;
mod bare;
mod filled;
mod lanes;
mod redis;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use hyv_host::accel::AccelKind;
use hyv_host::program;
use hyv_host::sys::cpu;
use hyv_host::wire::WireConfig;
use hyv_lab::{median, values};
use hyv_verbs::Gid;
use kvstore::client::Client;
use kvstore::limits::EAGER_VALUE_BYTES;
use kvstore::status::Status;
use kvstore::store::RESULT_RECORD_BYTES;
use rustix::process::Pid;

pub(super) use self::args::Args;
pub(super) use self::bare::{AgentArgs, agent};

use self::args::{Place, Rival, What};
use self::bare::Bare;
use self::lanes::{Check, Driver, Lane, Plan, Store, Until};
use self::redis::RedisSide;
use super::appliance::{self, Appliance, Boot, Booted};
use super::bench::{Server, collapse};
use crate::bench::filled::{OverwriteLine, TailLine};
use crate::bench::limits::{DEFAULT_FILL, DEFAULT_RECORDS, FILLED_MEMORY, KEY_BYTES};
use crate::bench::lines::Crossings;
use crate::bench::report::{self, Report, Settings, WorkloadLine};
use crate::bench::rpc::{self, Rpc};
use crate::report::{Accel, check_target, save};
use crate::session;

/// RAM of one connection: rings and buffers take some 300 KiB, staging for large values 6 MiB with its alignment.
const CONNECTION_RAM: u64 = 8 << 20;
/// Bytes of a record beside its value: key, header, padding, its part of the hash table.
const RECORD_OVERHEAD: u64 = KEY_BYTES as u64 + 76;
/// Guest memory that is not the store's, and what a store keeps back for its cleaner, at least.
const GUEST_BESIDE: u64 = 64 << 20;
/// Least RAM in which the guest serves. No more for few records: a scan goes through the hash table, and one that is mostly empty
/// is slow to go through.
const GUEST_LEAST: u64 = 64 << 20;

/// Runs it.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    program::start_log(&args.log)?;
    let what = What::of(args)?;
    if let Some(path) = args.json.as_deref() {
        check_target(path).map_err(anyhow::Error::msg)?;
    }
    let stop = program::stop_flag()?;
    let own = !args.places.is_empty() || args.vs.is_some() || what.instrument.is_some();
    if !own && (args.place.names_one() || session::any_runs()?) {
        return running(args, &what, &stop).map(|()| ExitCode::SUCCESS);
    }
    owned(args, &what, stop)
}

/// Measures the instance that runs.
fn running(args: &Args, what: &What, stop: &AtomicBool) -> Result<()> {
    let ways = 1 + u64::from(args.one_sided);
    let device = args.place.device(ram(args.clients) * ways)?;
    let mut clients = rpc::connect(args.clients, || {
        args.place.connect_with(&device, what.client_config())
    })?;
    let records = match args.records {
        Some(records) => records,
        None => {
            let stats = clients[0].stats()?;
            let room = stats.capacity_bytes.saturating_sub(stats.live_bytes) as f64 * DEFAULT_FILL;
            ((room / what.record_bytes() as f64) as u32).clamp(1, DEFAULT_RECORDS)
        }
    };
    eprintln!(
        "measuring the store reached by {}; its own records stay as they are",
        device.whose
    );
    let rpc = Rpc::new(clients, None, what.value_size)?;
    let plan = plan(args, what, records, stop);
    let mut lanes = vec![Lane::new("instance", None, Store::Rpc(rpc))];
    if args.one_sided {
        let config = what.one_sided_config(records);
        let clients = rpc::connect(args.clients, || args.place.connect_with(&device, config))?;
        let rpc = Rpc::new(clients, None, what.value_size)?.read_one_sided()?;
        lanes.push(Lane::new("instance-one-sided", None, Store::Rpc(rpc)));
    }
    let outcome = plan.load(&mut lanes[0], &|| Ok(())).and_then(|()| {
        measure(args, what, &plan, &mut lanes, None, &|| Ok(()), &mut || {
            Ok(())
        })
    });
    // Also after Ctrl-C: what was put there for the measurement goes again.
    let removed = plan.unload(&mut lanes[0]);
    let (results, _) = outcome?;
    removed?;
    finish(args, what, records, results, Extras::default())
}

/// What only a measurement with servers of its own has.
#[derive(Default)]
struct Extras {
    accel: Option<Accel>,
    mode: Option<crate::report::Mode>,
    floor: Option<report::Floors>,
    ratios: Vec<report::RatioLine>,
    redis: Option<report::RedisLine>,
    speedup: Option<report::Speedup>,
    cleaner_tail: Vec<TailLine>,
    overwrite: Vec<OverwriteLine>,
    cache_lines: Option<Crossings>,
}

/// Boots a guest, starts what else is measured, and measures.
fn owned(args: &Args, what: &What, stop: Arc<AtomicBool>) -> Result<ExitCode> {
    let records = args.records.unwrap_or(DEFAULT_RECORDS);
    let memory = match args.memory {
        Some(memory) => memory,
        None if what.instrument.is_some() => FILLED_MEMORY,
        None => memory_for(what, records),
    };
    let native = args.places.contains(&Place::Native);
    let stores = 1 + 2 * u64::from(native) + u64::from(args.vs.is_some());
    check_memory(memory, stores)?;
    if args.vs.is_some() {
        // A missing program shows before anything is booted.
        crate::redis::server::program("redis-server")?;
        crate::redis::server::program("redis-benchmark")?;
    }
    let port = args.place.port();
    let lanes = if native { 3 } else { 1 };
    let started = appliance::boot(Boot {
        name: None,
        prefix: "bench",
        image: appliance::image_path(args.image.as_ref())?,
        pin: args.pin.as_deref(),
        mode: args.mode,
        accel: args.accel,
        memory,
        port,
        wire: WireConfig::default(),
        log: &args.log,
        measured: true,
        client_ram: ram(args.clients) * (lanes + u64::from(one_sided(args))) + bare::PARTNER_RAM,
        stop,
    })?;
    let (appliance, client) = match started {
        Booted::Up(up) => *up,
        Booted::Failed(guest, e) => return appliance::guest_failed(guest, e),
    };
    eprintln!(
        "{}: up in {:.0} ms under {}, {} of memory",
        appliance.instance.dir().name(),
        appliance.boot_ms,
        appliance.accel,
        values::bytes(memory)
    );
    let outcome = match what.instrument {
        Some(instrument) => filled::run(args, what, instrument, &appliance, client),
        None => beside(args, what, records, &appliance, client, native),
    };
    if let Err(e) = outcome {
        return match appliance.guest.qemu().exit_report() {
            Some(_) => appliance::guest_failed(appliance.guest, e),
            None => {
                appliance::end(appliance)?;
                Err(e)
            }
        };
    }
    appliance::end(appliance)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures the guest, and what else was asked for beside it.
fn beside(
    args: &Args,
    what: &What,
    records: u32,
    appliance: &Appliance,
    first: Client,
    native: bool,
) -> Result<()> {
    // Children that are started from here on may run anywhere; this thread has its place.
    let rival = match args.vs {
        Some(Rival::Redis) => Some(RedisSide::start(&appliance.roles.guest)?),
        None => None,
    };
    let all = cpu::allowed().unwrap_or_default();
    cpu::pin_current(&appliance.roles.client).context("cannot run on the chosen CPU")?;
    if let Err(e) = appliance.guest.qemu().pin_others(&appliance.roles.client) {
        tracing::debug!("QEMU's other threads run anywhere: {e}");
    }
    let mut first = Some(first).filter(|_| what.exactly_once);
    let clients = rpc::connect(args.clients, || match first.take() {
        Some(client) => Ok(client),
        None => Ok(args
            .place
            .connect_by(&appliance.context, what.client_config())?),
    })?;
    let window = Arc::clone(appliance.guest.qemu().window());
    let pid =
        Pid::from_raw(appliance.guest.qemu().pid().cast_signed()).context("QEMU has no pid")?;
    let rpc = Rpc::new(clients, Some(Arc::clone(&window)), what.value_size)?;
    let mut lanes = vec![Lane::new("guest", Some(pid), Store::Rpc(rpc))];
    // A guest that only lends the device to native servers is not measured.
    let guest_too = args.places.is_empty() || args.places.contains(&Place::Guest);
    // A second way to the store of a lane; what is loaded by one is there for the other.
    let mut second = None;
    let config = what.one_sided_config(records);
    if one_sided(args) && guest_too {
        let clients = rpc::connect(args.clients, || {
            Ok(args.place.connect_by(&appliance.context, config)?)
        })?;
        let rpc = Rpc::new(clients, Some(window), what.value_size)?.read_one_sided()?;
        second = Some(Lane::new("guest-one-sided", Some(pid), Store::Rpc(rpc)));
    }
    let store_bytes = Status::read(&appliance.guest.qemu().window().user).store_bytes;
    let mut servers = Vec::new();
    if native {
        for (i, place) in [(1u16, "native"), (2, "twin")] {
            let (port, name) = (
                args.place.port().wrapping_add(i).max(1),
                format!("native-{i}"),
            );
            let mut server = Server::start(appliance, port, &name, store_bytes)?;
            let clients = rpc::connect(args.clients, || {
                server.connect_with(appliance, port, what.client_config())
            })?;
            let memory = appliance
                .instance
                .backend()
                .user_memory(&name)
                .context("the native server is gone")?;
            let window = || Some(Arc::clone(&memory.window));
            let rpc = Rpc::new(clients, window(), what.value_size)?;
            lanes.push(Lane::new(place, Some(server.pid), Store::Rpc(rpc)));
            if one_sided(args) && second.is_none() {
                let clients = rpc::connect(args.clients, || {
                    let client = Client::connect_with(&appliance.context, Gid::LOCAL, port, config);
                    Ok(client?)
                })?;
                let rpc = Rpc::new(clients, window(), what.value_size)?.read_one_sided()?;
                let lane = Lane::new("native-one-sided", Some(server.pid), Store::Rpc(rpc));
                second = Some(lane);
            }
            servers.push((server, memory));
        }
    }
    let plan = plan(args, what, records, &appliance.stop);
    let check = || super::bench::check(appliance);
    // One at a time: servers that poll would share a core.
    for lane in &lanes {
        lane.pause()?;
    }
    for lane in &mut lanes {
        lane.resume()?;
        lane.drive(appliance.inline());
        let loaded = plan.load(lane, &check);
        lane.drive(None);
        lane.pause()?;
        loaded?;
    }
    // Where data lies now large pages can be made; a comparison of unlike pages would be one of pages.
    collapse(appliance);
    for (_, memory) in &servers {
        let status = Status::read(&memory.window.user);
        if let Err(e) = memory.ram.collapse(status.store_offset, status.store_bytes) {
            tracing::debug!("a native store stays on small pages: {e}");
        }
    }
    lanes.extend(second);
    if let Some(rival) = &rival {
        for (place, redis) in rival.connect(args.clients)? {
            let mut lane = Lane::new(place, None, Store::Redis(redis));
            // Both ways lead to the same server.
            if place == redis::UNIX {
                plan.load(&mut lane, &check)?;
            }
            lanes.push(lane);
        }
    }
    let idle = if guest_too {
        None
    } else {
        Some(lanes.remove(0))
    };
    // Bare messages are for one at a time, of what fits a message.
    let mut bare = if plan.in_flight == 1 && what.value_size <= EAGER_VALUE_BYTES {
        let port = args.place.port().wrapping_add(3).max(1);
        Some(Bare::start(appliance, port, what.value_size)?)
    } else {
        None
    };
    let inline = || appliance.inline();
    let mut given_up = false;
    let mut beside = || {
        let Some(bare) = bare.as_mut().filter(|_| !given_up) else {
            return Ok(());
        };
        // A machine with other work may keep the other side from running; what has been found of it still counts.
        if let Err(e) = bare.round(appliance.inline()) {
            given_up = true;
            eprintln!("bare verbs are not measured any more: {e:#}");
        }
        super::bench::check(appliance)
    };
    let outcome = measure(
        args,
        what,
        &plan,
        &mut lanes,
        Some(&inline),
        &check,
        &mut beside,
    )
    .and_then(|(results, ratios)| {
        let found = match &rival {
            None => None,
            Some(rival) => Some(rival.throughput(
                &plan,
                what.workloads[0],
                &mut lanes[0],
                &inline,
                &appliance.stop,
            )?),
        };
        Ok((results, ratios, found))
    });
    for lane in lanes.iter().chain(&idle) {
        lane.resume()?;
    }
    cpu::pin_current(&all).context("cannot run on all CPUs again")?;
    let (mut results, ratios, found) = outcome?;
    let verbs = bare.as_mut().map(Bare::found).unwrap_or_default();
    let mut floors: Vec<f64> = lanes.iter().flat_map(Lane::floors).collect();
    let mut extras = Extras {
        accel: guest_too.then(|| accel(appliance)),
        cache_lines: crossings(what, appliance),
        mode: Some(appliance.mode),
        floor: (!floors.is_empty()).then(|| report::Floors {
            cache_line_rtt_ns: median(&mut floors),
            two_lines_rtt_ns: verbs.two_lines,
            send_rtt_ns: verbs.sends,
            send_bytes: rpc::message_bytes(what.value_size),
            read_rtt_ns: verbs.read,
            read_bytes: rpc::entry_read_bytes(what.value_size),
        }),
        ratios,
        ..Extras::default()
    };
    if let Some(floors) = &extras.floor {
        for line in results.iter_mut().filter(|l| !redis::is_redis(l.place)) {
            line.set_against(floors);
        }
    }
    if let Some(line) = found {
        extras.speedup = redis::speedup(&results, &line);
        extras.redis = Some(line);
    }
    drop(lanes);
    drop(idle);
    drop(servers);
    finish(args, what, records, results, extras)
}

type Found = (Vec<WorkloadLine>, Vec<report::RatioLine>);

/// Runs each workload on all lanes.
fn measure<'a>(
    args: &Args,
    what: &What,
    plan: &Plan<'_>,
    lanes: &mut [Lane<'a>],
    inline: Option<Driver<'_, 'a>>,
    check: &Check<'_>,
    beside: &mut dyn FnMut() -> Result<()>,
) -> Result<Found> {
    let (mut results, mut ratios) = (Vec::new(), Vec::new());
    let until = until(args);
    let out = |text: &str| out(args, text);
    out(&format!("{}\n{}\n", once_line(what), report::head()));
    for &workload in &what.workloads {
        plan.alternate(workload, lanes, until, inline, check, beside)?;
        for lane in lanes.iter().filter(|l| l.place != lanes::TWIN) {
            let line = lane.line(workload);
            out(&report::rows(&line));
            if let Some(why) = &lane.tally.first_error {
                eprintln!("{}: the first of its errors: {why}", lane.place);
            }
            results.push(line);
        }
        if let Some(line) = lanes::ratios(workload, lanes) {
            for (name, interval) in [
                ("guest / native, p50", line.p50),
                ("guest / native, time per operation", line.time_per_op),
                ("native / native, p50", line.aa_p50),
                ("native / native, time per operation", line.aa_time_per_op),
            ] {
                out(&format!("  {}\n", report::interval(name, interval)));
            }
            ratios.push(line);
        }
    }
    Ok((results, ratios))
}

/// Prints what is not the report: beside it, where that goes to standard output.
fn out(args: &Args, text: &str) {
    if args.json.as_deref().is_some_and(|p| p.as_os_str() == "-") {
        eprint!("{text}");
    } else {
        print!("{text}");
    }
}

/// What writes are, for the head of a table.
fn once_line(what: &What) -> String {
    if what.exactly_once {
        format!(
            "writes execute once: each also takes a result record of {RESULT_RECORD_BYTES} B in the log (--exactly-once off: none)"
        )
    } else {
        "writes may execute twice if a connection is lost (--exactly-once off)".to_owned()
    }
}

/// How long to measure.
const fn until(args: &Args) -> Until {
    match args.operations {
        Some(ops) => Until::Operations(ops),
        None => Until::Time(args.time),
    }
}

/// What runs the guest.
fn accel(appliance: &Appliance) -> Accel {
    match appliance.guest.qemu().accel() {
        AccelKind::Kvm => Accel::Kvm,
        AccelKind::Tcg => Accel::Tcg,
    }
}

/// What crosses between the cores, where this process drives the engine: elsewhere the engine has a core of its own.
fn crossings(what: &What, appliance: &Appliance) -> Option<Crossings> {
    (appliance.mode == crate::report::Mode::Inline)
        .then(|| Crossings::of(what.value_size, what.exactly_once))
}

fn finish(
    args: &Args,
    what: &What,
    records: u32,
    results: Vec<WorkloadLine>,
    extras: Extras,
) -> Result<()> {
    if let Some(floor) = extras.floor {
        eprintln!(
            "floor: {:.0} ns for one cache line to the server's core and back",
            floor.cache_line_rtt_ns
        );
        if let Some((two, sends)) = floor.two_lines_rtt_ns.zip(floor.send_rtt_ns) {
            let [request, reply] = floor.send_bytes;
            eprintln!(
                "       {two:.0} ns for a line each way; {sends:.0} ns for bare SENDs of {request} and {reply} bytes, as a \
                 read's request and reply"
            );
        }
        if let Some(read) = floor.read_rtt_ns {
            eprintln!(
                "       {read:.0} ns for a bare READ of {} bytes, as a one-sided read of a known place",
                floor.read_bytes
            );
        }
        for line in &results {
            let Some(bare) = line.bare else { continue };
            let verbs = if line.is_one_sided() {
                "the bare READ"
            } else {
                "the bare SENDs"
            };
            eprintln!(
                "workload {}, {}: the median of a read is {bare:.2} times {verbs}",
                line.workload, line.place
            );
        }
    }
    if let Some(lines) = &extras.cache_lines {
        eprintln!("{}", lines.shown());
    }
    if let Some(redis) = &extras.redis {
        eprint!("{}", redis::shown(redis, extras.speedup));
    }
    let report = Report {
        accel: extras.accel,
        mode: extras.mode,
        settings: Settings {
            records,
            value_size: what.value_size,
            key_size: KEY_BYTES,
            in_flight: u32::from(what.in_flight),
            clients: args.clients,
            read_share: args.read_share,
            seed: what.seed,
            exactly_once: what.exactly_once,
        },
        floor: extras.floor,
        results,
        ratios: extras.ratios,
        cleaner_tail: extras.cleaner_tail,
        overwrite: extras.overwrite,
        cache_lines: extras.cache_lines,
        redis: extras.redis,
        speedup: extras.speedup,
    };
    if let Some(path) = &args.json {
        save(&report, path)?;
    }
    let errors: u64 = report
        .results
        .iter()
        .flat_map(|l| &l.operations)
        .map(|o| o.errors)
        .sum();
    if errors > 0 {
        bail!("{errors} operations failed: see the table; the figures are not to be relied on");
    }
    Ok(())
}

fn plan<'a>(args: &Args, what: &What, records: u32, stop: &'a AtomicBool) -> Plan<'a> {
    Plan {
        records,
        value_size: what.value_size,
        read_share: args.read_share,
        in_flight: u32::from(what.in_flight) * u32::from(args.clients),
        seed: what.seed,
        stop,
    }
}

/// Whether reads that are one-sided are measured too.
const fn one_sided(args: &Args) -> bool {
    args.one_sided || args.vs.is_some()
}

/// Memory of this process for so many connections to a server.
fn ram(clients: u16) -> u64 {
    (u64::from(clients) + 1) * CONNECTION_RAM
}

/// Memory of a guest whose store these records fill to less than two thirds.
fn memory_for(what: &What, records: u32) -> u64 {
    let data = u64::from(records) * what.record_bytes();
    (data * 8 / 5 + GUEST_BESIDE)
        .next_multiple_of(2 << 20)
        .max(GUEST_LEAST)
}

/// Several stores of this size have to fit what the machine has free.
fn check_memory(memory: u64, stores: u64) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    if let Some(free) = free.map(|kb| kb << 10)
        && memory.saturating_mul(stores) > free
    {
        bail!(
            "{stores} stores of {} each do not fit the machine's free memory of {}: give fewer --records, a smaller \
             --value-size, or --memory",
            values::bytes(memory),
            values::bytes(free)
        );
    }
    Ok(())
}

/// Ends a measurement that was told to end.
fn interrupted(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        bail!("bench: interrupted");
    }
    Ok(())
}
