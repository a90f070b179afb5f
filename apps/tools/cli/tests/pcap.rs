//! `hyv-tools pcap check` as a user runs it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn captures(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../../host/roce/tests/captures")
        .join(name)
}

fn check(args: &[&str], input: Option<&[u8]>) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_hyv-tools"))
        .args(["pcap", "check"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    if let Some(bytes) = input {
        // A program that has seen enough may have gone away.
        let _ = stdin.write_all(bytes);
    }
    drop(stdin);
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn count<'a>(report: &'a Value, list: &str, key: &str, name: &str) -> Option<&'a Value> {
    let lines = report[list].as_array().unwrap();
    lines.iter().find(|l| l[key] == name)
}

#[test]
fn a_capture_of_linux_is_right() {
    let path = captures("pingpong.pcap");
    let path = path.to_str().unwrap();
    let out = check(&[path], None);
    assert!(out.status.success());
    let said = text(&out.stdout);
    for line in [
        "1242  0x04 RC SEND Only",
        "info  retransmission",
        "REQ 13",
        "nothing wrong",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }

    let out = check(&[path, "--json", "-", "--streams"], None);
    assert!(out.status.success());
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["ok"], true);
    assert_eq!(report["errors"], 0);
    assert_eq!(report["packets"], 3743);
    assert_eq!(
        count(&report, "opcodes", "name", "RC SEND Only").unwrap()["count"],
        1242
    );
    let again = count(&report, "findings", "finding", "retransmission").unwrap();
    assert_eq!(
        (&again["count"], &again["error"]),
        (&Value::from(31), &Value::from(false))
    );
    assert_eq!(report["streams"].as_array().unwrap().len(), 33);
}

#[test]
fn a_report_goes_to_a_file_too() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let path = captures("cm.pcap");
    let out = check(
        &[path.to_str().unwrap(), "--json", report.to_str().unwrap()],
        None,
    );
    assert!(out.status.success());
    assert!(text(&out.stdout).contains("nothing wrong"));
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["cm_messages"].as_array().unwrap().len(), 8);

    let out = check(
        &[path.to_str().unwrap(), "--json", "/nonexistent/r.json"],
        None,
    );
    assert!(!out.status.success());
    assert!(text(&out.stderr).contains("/nonexistent"), "{out:?}");
}

#[test]
fn one_wrong_byte_is_an_error() {
    let mut file = std::fs::read(captures("vec.pcap")).unwrap();
    // In the payload of the tenth packet or so.
    file[24 + 2000] ^= 1;
    let out = check(&["-"], Some(&file));
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stdout).contains("ERROR icrc"), "{out:?}");
    assert!(
        text(&out.stdout).contains("thing wrong") || text(&out.stdout).contains("things wrong")
    );

    let out = check(&["-", "--json", "-"], Some(&file));
    assert_eq!(out.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let icrc = count(&report, "findings", "finding", "icrc").unwrap();
    assert_eq!(
        (&icrc["count"], &icrc["error"]),
        (&Value::from(1), &Value::from(true))
    );
    assert!(icrc["examples"][0]["record"].as_u64().unwrap() > 1);
}

#[test]
fn files_that_are_none() {
    let out = check(&["/nonexistent/x.pcap"], None);
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(
        said.starts_with("error: cannot open the capture /nonexistent/x.pcap: No such file"),
        "{said}"
    );

    let out = check(&["/"], None);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("is a folder"), "{out:?}");

    for (bytes, says) in [
        (&b"GIF89a, and so on, for some bytes"[..], "not a capture"),
        (b"", "ends in the middle of the file's header"),
        (
            &[0xd4, 0xc3, 0xb2, 0xa1, 2, 0],
            "ends in the middle of the file's header",
        ),
    ] {
        let out = check(&["-"], Some(bytes));
        assert_eq!(out.status.code(), Some(1), "{says}");
        assert!(out.stdout.is_empty());
        let said = text(&out.stderr);
        assert!(
            said.starts_with("error: standard input") && said.contains(says),
            "{said}"
        );
    }
}

#[test]
fn a_file_that_ends_early_is_reported_as_far_as_it_goes() {
    let file = std::fs::read(captures("cm.pcap")).unwrap();
    let out = check(&["-"], Some(&file[..file.len() - 1]));
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stdout);
    assert!(
        said.contains("107 RoCEv2 packets") && said.contains("ends in the middle of a packet"),
        "{said}"
    );
    let out = check(&["-", "--json", "-"], Some(&file[..file.len() - 1]));
    assert_eq!(out.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&report["ok"], &report["errors"]),
        (&Value::from(false), &Value::from(1))
    );
    assert!(report["file_error"].is_string());
}

#[test]
fn nothing_to_check_is_said() {
    let header = hyv_roce::pcap::file_header(hyv_roce::pcap::LinkType::Ethernet);
    let mut file = header.to_vec();
    file.extend(hyv_roce::pcap::record_header(0, 60));
    file.extend([0; 60]);
    let out = check(&["-"], Some(&file));
    assert!(out.status.success());
    let said = text(&out.stdout);
    assert!(
        said.contains("not-ip 1") && said.contains("nothing was checked"),
        "{said}"
    );
}
