//! docs/control-verbs.md says what `hyv_abi::control::VERBS` says.
#![cfg(not(loom))]

use hyv_abi::control::VERBS;

#[test]
fn the_table_of_control_verbs_is_documented_as_it_is() {
    let text = include_str!("../../docs/control-verbs.md");
    let rows: Vec<_> = text
        .lines()
        .filter(|l| l.starts_with("| ") && l.contains('`'))
        .collect();
    assert_eq!(rows.len(), VERBS.len());
    for (verb, row) in VERBS.iter().zip(rows) {
        let (number, name) = (verb.opcode as u16, verb.name);
        let start = format!(
            "| {number} | `{name}` | {} | {}",
            verb.request_len, verb.reply_len
        );
        let end = format!(" | {} |", verb.doc);
        let reply = row.strip_prefix(&start).and_then(|r| r.strip_suffix(&end));
        let good = match (reply, verb.reply_len) {
            (Some(""), 0) => true,
            (Some(named), n) if n > 0 => named.starts_with(" `") && named.ends_with('`'),
            _ => false,
        };
        assert!(good, "{start} ...{end}\nis documented as\n{row}");
    }
}
