use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn summary() -> LatencySummary {
    LatencySummary {
        ops: 7,
        ops_per_s: 3.5,
        p50_ns: 158,
        p99_ns: 240,
        p999_ns: 4300,
        max_ns: 9000,
    }
}

fn bare() -> Report {
    Report {
        accel: Accel::Tcg,
        boot_ms: 52.25,
        image_bytes: 200_000,
        guest_overhead_bytes: 4 << 20,
        loaded: 63_666,
        verified: 63_666,
        get: Some(summary()),
        put: None,
        vm_exits_per_million_ops: None,
        host_irq_exits_per_second: None,
        mode: Some(Mode::Inline),
        floor: Some(Floor {
            cache_line_rtt_ns: 105.0,
        }),
        native: None,
        ratio_p50: None,
        ratio_p99: None,
        aa_p50: None,
    }
}

#[test]
fn names_are_those_that_readers_of_reports_rely_on() {
    let ratio = Interval {
        median: 1.02,
        low: 0.99,
        high: 1.04,
    };
    let full = Report {
        accel: Accel::Kvm,
        vm_exits_per_million_ops: Some(1.5),
        host_irq_exits_per_second: Some(270.0),
        native: Some(Native {
            loaded: 1,
            verified: 1,
            get: Some(summary()),
            put: Some(summary()),
            mode: Some(Mode::Thread),
            floor: None,
        }),
        ratio_p50: Some(ratio),
        ratio_p99: Some(ratio),
        aa_p50: Some(ratio),
        ..bare()
    };
    let latency = serde_json::json!({
        "ops": 7, "ops_per_s": 3.5, "p50_ns": 158, "p99_ns": 240, "p999_ns": 4300, "max_ns": 9000
    });
    let interval = serde_json::json!({ "median": 1.02, "low": 0.99, "high": 1.04 });
    let expected = serde_json::json!({
        "accel": "kvm", "boot_ms": 52.25, "image_bytes": 200_000,
        "guest_overhead_bytes": 4_194_304, "loaded": 63_666, "verified": 63_666,
        "get": latency, "put": null,
        "vm_exits_per_million_ops": 1.5, "host_irq_exits_per_second": 270.0,
        "mode": "inline", "floor": { "cache_line_rtt_ns": 105.0 },
        "native": { "loaded": 1, "verified": 1, "get": latency, "put": latency,
                    "mode": "thread", "floor": null },
        "ratio_p50": interval, "ratio_p99": interval, "aa_p50": interval,
    });
    assert_eq!(serde_json::to_value(&full).unwrap(), expected);
    assert_eq!(serde_json::from_value::<Report>(expected).unwrap(), full);
}

#[test]
fn without_a_comparison_its_fields_are_absent_and_unknown_counts_are_null() {
    let value = serde_json::to_value(bare()).unwrap();
    let object = value.as_object().unwrap();
    for name in ["native", "ratio_p50", "ratio_p99", "aa_p50"] {
        assert!(!object.contains_key(name), "{name}");
    }
    assert!(object["vm_exits_per_million_ops"].is_null());
    assert_eq!(serde_json::from_value::<Report>(value).unwrap(), bare());
}

#[test]
fn saving_replaces_the_file_and_leaves_nothing_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    std::fs::write(&path, "old and much longer ".repeat(1000)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    bare().save(&path).unwrap();
    let read: Report = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(read, bare());
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(folder.path().read_dir().unwrap().count(), 1);
}

#[test]
fn a_symbolic_link_stays_one() {
    let folder = tempfile::tempdir().unwrap();
    let (link, target) = (folder.path().join("link"), folder.path().join("target"));
    std::fs::write(&target, "old").unwrap();
    symlink(&target, &link).unwrap();
    bare().save(&link).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert!(
        std::fs::read_to_string(&target)
            .unwrap()
            .contains("\"accel\"")
    );
}

#[test]
fn a_folder_that_does_not_exist_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no/report.json");
    let error = bare().save(&path).unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    assert!(error.contains("No such file"), "{error}");
    assert_eq!(error.matches("report.json").count(), 1, "{error}");
}

#[test]
fn a_replacement_that_is_dropped_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let mut file = hyv_lab::Replacement::create(&path).unwrap();
    file.write_all(b"half of the new").unwrap();
    drop(file);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(folder.path().read_dir().unwrap().count(), 1);
}
