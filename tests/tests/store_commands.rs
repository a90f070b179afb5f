//! Commands for tables, expiry, conditions and numbers; and the server as a Linux process.

use hyv_e2e::{
    Accelerator, Appliance, PATIENCE, Running, Sandbox, eventually, on_each_accelerator,
};
use rustix::process::Signal;

on_each_accelerator! {
    fn tables_conditions_expiry_and_numbers(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        let get = |args: &[&str]| sandbox.kv([&["get"], args].concat());

        // A table of its own: the same key, other values.
        sandbox.kv(["put", "k", "in default"]).ok();
        sandbox.kv(["table", "create", "users"]).ok();
        sandbox.kv(["table", "create", "users"]).fails(&["a table named `users` already"]);
        sandbox.kv(["put", "--table", "users", "k", "in users"]).ok();
        assert_eq!(get(&["k"]).ok().text(), "in default");
        assert_eq!(get(&["--table", "users", "k"]).ok().text(), "in users");
        let missing: &[&str] = &["no table named `nobody`", "kv table create"];
        for command in [&["get", "k"][..], &["put", "k", "v"], &["del", "k"], &["list"], &["incr", "k"]] {
            sandbox.kv([command, &["--table", "nobody"]].concat()).fails(missing);
        }
        sandbox.kv(["table", "drop", "nobody"]).fails(missing);
        sandbox.kv(["table", "drop", "default"]).fails(&["default"]);
        sandbox.kv(["table", "create", ""]).fails(&["name"]);

        // Files by table.
        sandbox.kv_with_input(["load", "-", "--table", "users"], b"a\t1\nb\t2\n").ok();
        let mut keys: Vec<String> = sandbox.kv(["list", "--table", "users"]).ok().text().lines().map(Into::into).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["a", "b", "k"]);
        let dump = sandbox.kv(["dump", "-", "--table", "users"]).ok();
        assert_eq!(dump.text().lines().count(), 3, "{}", dump.story());
        assert_eq!(sandbox.kv(["list"]).ok().text(), "k\n");

        // Conditions.
        sandbox.kv(["put", "--if-absent", "once", "1"]).ok();
        sandbox.kv(["put", "--if-absent", "once", "2"]).fails(&["once", "nothing was changed", "exists"]);
        let version = get(&["--version", "once"]).ok().err;
        let version = version.trim().trim_start_matches("version ").to_owned();
        let another = (version.parse::<u64>().expect("a version") + 1).to_string();
        sandbox.kv(["put", "--if-version", &another, "once", "3"]).fails(&["nothing was changed", &version]);
        sandbox.kv(["del", "--if-version", &another, "once"]).fails(&["nothing was changed", &version]);
        sandbox.kv(["put", "--if-version", &version, "once", "3"]).ok();
        assert_eq!(get(&["once"]).ok().text(), "3");
        sandbox.kv(["put", "--if-version", &version, "--if-absent", "once", "4"]).fails(&["--if-absent"]);

        // Expiry: one that comes, one that is far away.
        sandbox.kv(["put", "--ttl", "50ms", "brief", "v"]).ok();
        eventually("it has expired", || get(&["brief"]).err.contains("no such key"));
        sandbox.kv(["put", "--if-absent", "--ttl", "1h", "brief", "w"]).ok();
        assert_eq!(get(&["brief"]).ok().text(), "w");
        sandbox.kv(["put", "--expires", "9000000000", "brief", "x"]).ok();
        assert_eq!(get(&["brief"]).ok().text(), "x");
        sandbox.kv(["put", "--expires", "1000", "brief", "y"]).fails(&["--expires 1000 is over"]);
        sandbox.kv(["put", "--ttl", "0s", "brief", "y"]).fails(&["--ttl"]);

        // Numbers.
        assert_eq!(sandbox.kv(["incr", "n"]).ok().text(), "1\n");
        assert_eq!(sandbox.kv(["incr", "n", "-43"]).ok().text(), "-42\n");
        assert_eq!(sandbox.kv(["incr", "--table", "users", "x", "1.5"]).ok().text(), "1.5\n");
        assert_eq!(sandbox.kv(["incr", "--table", "users", "x", "0.25"]).ok().text(), "1.75\n");
        sandbox.kv(["incr", "n", "0.5"]).fails(&["n holds the integer -42", "decimal point"]);
        sandbox.kv(["incr", "n", "much"]).fails(&["much", "integer"]);
        sandbox.kv(["incr", "once"]).fails(&["once", "8 bytes"]);

        // What was done, by table.
        sandbox.kv(["del", "--table", "users", "a"]).ok();
        let stats = sandbox.stats();
        let of = |name: &str| {
            let all = stats["by_table"].as_array().expect("a list");
            all.iter().find(|t| t["name"] == name).unwrap_or_else(|| panic!("no {name} in {stats}"))
        };
        for (field, count) in [("objects", 3), ("writes", 3), ("removes", 1), ("increments", 2)] {
            assert_eq!(of("users")[field], count, "{field} of {stats}");
        }
        assert_eq!(of("default")["objects"], 4, "{stats}");
        assert!(of("users")["reads"].as_u64().is_some_and(|n| n >= 4), "{stats}");
        assert!(stats["service_ns"]["read"]["p50"].is_u64(), "{stats}");
        // Commands leave nothing behind: there are the one that counts, and the one that shows the running figures.
        assert_eq!(stats["leases"], 2, "{stats}");
        let people = sandbox.kv(["stats"]).ok().text();
        assert!(people.contains("users") && people.contains("p99.9"), "{people}");

        let list = sandbox.kv(["table", "list"]).ok().text();
        assert!(list.starts_with("default\t4\t") && list.contains("\nusers\t3\t"), "{list}");
        sandbox.kv(["table", "drop", "users"]).ok();
        sandbox.kv(["get", "--table", "users", "k"]).fails(&["no table named `users`"]);
        // Again, and nothing of before is in it.
        sandbox.kv(["table", "create", "users"]).ok();
        assert_eq!(sandbox.kv(["list", "--table", "users"]).ok().text(), "");
        assert_eq!(sandbox.counter("objects"), 4);
        store.end();
    }
}

fn native(sandbox: &Sandbox, args: &[&str]) -> Running {
    let server = sandbox.spawn(sandbox.kv_command([&["native-server"], args].concat()));
    let port = if args.contains(&"7072") {
        "7072"
    } else {
        "7071"
    };
    eventually("the native server serves", || {
        sandbox.kv(["list", "--port", port]).err.is_empty()
    });
    server
}

#[test]
fn the_server_as_a_linux_process() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    let mut first = native(&sandbox, &["--memory", "32M"]);
    let mut second = native(&sandbox, &["--memory", "32M", "--port", "7072"]);
    // Three stores on one device, each with its own objects.
    for (port, value) in [("7070", "guest"), ("7071", "first"), ("7072", "second")] {
        sandbox.kv(["put", "--port", port, "k", value]).ok();
        sandbox.kv(["table", "create", "--port", port, value]).ok();
    }
    for (port, value) in [("7070", "guest"), ("7071", "first"), ("7072", "second")] {
        assert_eq!(sandbox.kv(["get", "--port", port, "k"]).ok().text(), value);
        let list = sandbox.kv(["table", "list", "--port", port]).ok().text();
        assert_eq!(list.lines().count(), 2, "{list}");
        let stats = sandbox.kv(["stats", "--json", "--port", port]).ok().text();
        assert!(stats.contains("\"objects\":1,"), "{stats}");
    }
    // A port that is taken, and flags that are wrong.
    for port in ["7070", "7071"] {
        sandbox
            .kv(["native-server", "--port", port, "--memory", "32M"])
            .fails(&["cannot serve on port", port]);
    }
    sandbox
        .kv(["native-server", "--memory", "1M"])
        .fails(&["memory"]);
    sandbox.kv(["native-server", "--pin", "x"]).fails(&["x"]);
    sandbox
        .kv(["native-server", "--frobnicate"])
        .fails(&["--frobnicate"]);

    // Ctrl-C ends one; the others do not notice.
    first.signal(Signal::INT);
    first.wait(PATIENCE).ok();
    sandbox.kv(["get", "--port", "7071", "k"]).fails(&["7071"]);
    assert_eq!(
        sandbox.kv(["get", "--port", "7072", "k"]).ok().text(),
        "second"
    );
    let again = native(&sandbox, &["--memory", "32M"]);
    sandbox
        .kv(["get", "--port", "7071", "k"])
        .fails(&["no such key"]);
    again.kill();
    second.signal(Signal::INT);
    second.wait(PATIENCE).ok();
    store.end();
}
