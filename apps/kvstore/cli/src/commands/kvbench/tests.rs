//! What the command line means.

use clap::Parser as _;

use super::filled::Instrument;
use super::*;
use crate::bench::workload::Workload;

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn args(words: &[&str]) -> Result<Args, clap::Error> {
    Line::try_parse_from([&["bench"], words].concat()).map(|l| l.args)
}

#[test]
fn defaults_are_those_of_ycsb_and_of_the_mix() {
    for (words, workloads, value_size) in [
        (&[][..], 6, 1_000),
        (&["--workload", "get-put"], 1, 100),
        (&["--vs", "redis"], 1, 100),
        (&["--workload", "a,get-put"], 2, 1_000),
        (&["--workload", "A", "--value-size", "4K"], 1, 4_096),
    ] {
        let what = What::of(&args(words).expect("legal")).expect("legal");
        assert_eq!(
            (what.workloads.len(), what.value_size),
            (workloads, value_size)
        );
    }
}

#[test]
fn json_stands_alone_or_with_a_file() {
    let json = |words: &[&str]| args(words).expect("legal").json;
    assert_eq!(json(&[]), None);
    assert_eq!(json(&["--json"]), Some("-".into()));
    assert_eq!(json(&["--json", "--for", "1s"]), Some("-".into()));
    assert_eq!(json(&["--json", "r.json"]), Some("r.json".into()));
}

#[test]
fn what_makes_no_sense_is_refused() {
    for words in [
        &["--read-share", "1.5"][..],
        &["--read-share", "-0.1"],
        &["--read-share", "most"],
        &["--workload", "z"],
        &["--records", "0"],
        &["--records", "4294967295"],
        &["--operations", "0"],
        &["--operations", "5", "--for", "1s"],
        &["--clients", "0"],
        &["--clients", "65"],
        &["--in-flight", "17"],
        &["--where", "moon"],
        &["--where", "guest", "--instance", "x"],
        &["--vs", "memcached"],
        &["--utilisation", "0"],
        &["--utilisation", "97"],
        &["--cleaner-tail", "--vs", "redis"],
        &["--cleaner-tail", "--records", "5"],
        &["--exactly-once", "maybe"],
    ] {
        assert!(args(words).is_err(), "{words:?}");
    }
    let large = args(&["--value-size", "1048577"]).expect("parsed");
    assert!(What::of(&large).is_err_and(|e| e.to_string().contains("1048576")));
}

#[test]
fn memory_follows_the_records() {
    let what = What::of(&args(&["--workload", "get-put"]).expect("legal")).expect("legal");
    assert!((GUEST_LEAST..=GUEST_LEAST + (2 << 20)).contains(&memory_for(&what, 1)));
    let million = memory_for(&what, 1_000_000);
    assert!(million > 300 << 20 && million.is_multiple_of(2 << 20));
    assert!(check_memory(u64::MAX / 2, 4).is_err());
    assert!(check_memory(1 << 20, 4).is_ok());
}

#[test]
fn a_store_that_is_filled_is_measured_by_itself() {
    let what = |words: &[&str]| What::of(&args(words).expect("parsed"));
    let tail = what(&["--cleaner-tail"]).expect("legal");
    assert_eq!(tail.instrument, Some(Instrument::Tail));
    assert_eq!(
        (&tail.workloads[..], tail.value_size),
        (&[Workload::C][..], 100)
    );
    assert_eq!((&tail.utilisations[..], tail.in_flight), (&[80][..], 1));
    let over = what(&["--workload", "overwrite"]).expect("legal");
    assert_eq!(over.instrument, Some(Instrument::Overwrite));
    assert_eq!((over.value_size, over.in_flight), (100, 16));
    assert_eq!(over.utilisations, [30, 80, 90]);
    assert!(over.exactly_once);
    let off = what(&["--exactly-once", "off"]).expect("legal");
    assert!(!off.exactly_once && !off.client_config().exactly_once && off.instrument.is_none());
    for (words, why) in [
        (
            &["--cleaner-tail", "--workload", "a,b"][..],
            "one --workload",
        ),
        (&["--cleaner-tail", "--workload", "d"], "one --workload"),
        (
            &["--cleaner-tail", "--utilisation", "30,80"],
            "one --utilisation",
        ),
        (&["--workload", "overwrite,a"], "by itself"),
        (&["--workload", "overwrite", "--records", "5"], "--records"),
        (&["--workload", "overwrite", "--vs", "redis"], "--vs"),
        (
            &["--workload", "a", "--utilisation", "80"],
            "--utilisation is for",
        ),
    ] {
        let refused = what(words).map(|_| ()).expect_err(why);
        assert!(refused.to_string().contains(why), "{words:?}: {refused}");
    }
}
