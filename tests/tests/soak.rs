//! A short soak: clients that fight and are killed, a full store, and a check of all that they were told.

use hyv_e2e::{Sandbox, on_each_accelerator};

on_each_accelerator! {
    fn a_short_one(accelerator) {
        let sandbox = Sandbox::new();
        let soak = sandbox
            .kv([
                "soak", "--accel", accelerator.name(), "--for", "6s", "--check-every", "2s", "--kill-every", "300ms",
                "--clients", "4", "--memory", "64M",
            ])
            .ok()
            .text();
        let summary = soak.lines().last().unwrap_or_default();
        assert!(summary.ends_with("nothing wrong"), "{soak}");
        let killed = summary
            .split(", ")
            .find_map(|part| part.strip_suffix(" clients killed"))
            .and_then(|n| n.parse::<u32>().ok());
        assert!(killed.is_some_and(|n| n > 0), "nobody was killed: {soak}");
        assert!(soak.contains("keys linearizable"), "{soak}");
    }
}
