//! The commands behind `run.sh`: sets up what is missing, builds guest and host, runs or tests them.

mod build;
mod cargo;
mod elf;
mod limits;
mod paths;
mod setup;
mod test;

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;

use setup::Need;

/// hyv: a unikernel with RDMA built in, and a key-value store as its first appliance.
#[derive(Parser)]
#[command(
    name = "./run.sh",
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
#[command(after_help = "Each command has its own --help. Example:\n\n  \
    ./run.sh kvstore              in one terminal\n  \
    ./run.sh kv put hello world   in another")]
enum Cli {
    /// Boot the key-value store as a unikernel in QEMU and serve it over RDMA until Ctrl-C.
    ///
    /// Installs QEMU where it is missing (as root; otherwise says how), builds, boots. The flags are those
    /// of `kv appliance`: see `./run.sh kvstore --help`.
    #[command(disable_help_flag = true)]
    Kvstore(PassedOn),
    /// Talk to a running store: put, get, del, list, load, dump, stats, bench (see `kv --help`).
    #[command(disable_help_flag = true)]
    Kv(PassedOn),
    /// Run a store under clients that fight and are killed, and check all that they were told (see `soak --help`).
    #[command(disable_help_flag = true)]
    Soak(PassedOn),
    /// Measure verbs: latency or bandwidth, in a guest and as a Linux process (see `perf --help`).
    #[command(disable_help_flag = true)]
    Perf(PassedOn),
    /// Exchange messages with ibv_rc_pingpong, ibv_uc_pingpong or ibv_ud_pingpong, as client or server.
    #[command(disable_help_flag = true)]
    Pingpong(PassedOn),
    /// Exchange messages with rping over RDMA CM, as client or server.
    #[command(disable_help_flag = true)]
    Rping(PassedOn),
    /// Check captures of RoCEv2: every ICRC, every byte, every PSN (see `pcap --help`).
    #[command(disable_help_flag = true)]
    Pcap(PassedOn),
    /// Run any image with hyv-host (see `host --help`).
    #[command(disable_help_flag = true)]
    Host(PassedOn),
    /// Install what building and running needs (as root; otherwise print the line that does).
    Setup,
    /// Build images and host programs, and say nothing if there was nothing to do.
    Build,
    /// Check formatting and lints of host and guest code.
    Check,
    /// Set up, build, and run every test: formatting, lints, unit and property tests, loom, end to end.
    Test(test::Options),
}

#[derive(clap::Args)]
struct PassedOn {
    /// Passed on as they are.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    args: Vec<OsString>,
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(help_first(std::env::args_os().collect()));
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let paths = paths::Paths::find();
    match cli {
        Cli::Kvstore(PassedOn { args }) => store(&paths, "appliance", args, "./run.sh kvstore"),
        Cli::Soak(PassedOn { args }) => store(&paths, "soak", args, "./run.sh"),
        Cli::Kv(PassedOn { args }) => {
            // It may boot a guest of its own, and compares with what --vs names.
            let bench = args.first().is_some_and(|arg| arg == "bench") && !asks_for_help(&args);
            let mut needs = vec![Need::Linker];
            if bench {
                needs.push(Need::Qemu);
                if has_option(&args, "--vs") {
                    needs.push(Need::Redis);
                }
            }
            setup::require(&needs)?;
            if bench && !has_option(&args, "--image") {
                build::images(&paths, build::KVSTORE_IMAGE)?;
            }
            build::host_program(&paths, build::KV)?;
            exec(&paths, &paths.program("kv"), args, "./run.sh kv").map(|never| match never {})
        }
        Cli::Perf(PassedOn { args }) => tools(&paths, "perf", args, true),
        Cli::Pingpong(PassedOn { args }) => tools(&paths, "pingpong", args, true),
        Cli::Rping(PassedOn { args }) => tools(&paths, "rping", args, true),
        Cli::Pcap(PassedOn { args }) => tools(&paths, "pcap", args, false),
        Cli::Host(PassedOn { args }) => {
            if !asks_for_help(&args) {
                setup::require(&[Need::Linker, Need::Qemu])?;
            }
            build::host_program(&paths, build::HYV_HOST)?;
            exec(&paths, &paths.program("hyv-host"), args, "./run.sh host")
                .map(|never| match never {})
        }
        Cli::Setup => {
            setup::require(&[Need::Linker, Need::Qemu, Need::Networks])?;
            println!("everything needed is there");
            Ok(ExitCode::SUCCESS)
        }
        Cli::Build => {
            setup::require(&[Need::Linker])?;
            build::everything(&paths)?;
            Ok(ExitCode::SUCCESS)
        }
        Cli::Check => test::check(&paths),
        Cli::Test(options) => test::run(&paths, &options),
    }
}

/// Becomes `kv COMMAND ARGS`, a command that boots the store.
fn store(paths: &paths::Paths, command: &str, args: Vec<OsString>, name: &str) -> Result<ExitCode> {
    // For help, and for an image of the user's own, ours need not be there.
    let help = asks_for_help(&args);
    if !help {
        setup::require(&[Need::Linker, Need::Qemu])?;
    }
    if !help && !has_option(&args, "--image") {
        build::images(paths, build::KVSTORE_IMAGE)?;
    }
    build::host_program(paths, build::KV)?;
    let args = [OsString::from(command)].into_iter().chain(args);
    exec(paths, &paths.program("kv"), args, name).map(|never| match never {})
}

/// Becomes `hyv-tools TOOL ARGS`; with `guest`, its image is built too.
fn tools(paths: &paths::Paths, tool: &str, args: Vec<OsString>, guest: bool) -> Result<ExitCode> {
    let guest = guest && !asks_for_help(&args);
    if guest {
        setup::require(&[Need::Linker, Need::Qemu])?;
        if !has_option(&args, "--image") {
            build::images(paths, build::TOOLS_IMAGE)?;
        }
    } else {
        setup::require(&[Need::Linker])?;
    }
    build::host_program(paths, build::TOOLS)?;
    let args = [OsString::from(tool)].into_iter().chain(args);
    exec(paths, &paths.program("hyv-tools"), args, "./run.sh").map(|never| match never {})
}

/// Becomes `program`, in the caller's folder, with the environment that tells it where images are.
fn exec(
    paths: &paths::Paths,
    program: &Path,
    args: impl IntoIterator<Item = OsString>,
    name: &str,
) -> Result<Infallible> {
    let error = Command::new(program)
        .args(args)
        .envs(paths.environment())
        .env("HYV_COMMAND", name)
        .exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// `help CMD …` as `CMD … --help`, so that commands that are passed on answer for themselves.
fn help_first(mut args: Vec<OsString>) -> Vec<OsString> {
    if args.get(1).is_some_and(|arg| arg == "help") {
        args.remove(1);
        args.push("--help".into());
    }
    args
}

fn asks_for_help(args: &[OsString]) -> bool {
    args.iter()
        .take_while(|arg| *arg != "--")
        .any(|arg| arg == "--help" || arg == "-h" || arg == "--version" || arg == "-V")
}

fn has_option(args: &[OsString], name: &str) -> bool {
    args.iter().take_while(|arg| *arg != "--").any(|arg| {
        let arg = arg.as_encoded_bytes();
        arg.strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"="))
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn os(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_other_programs_are_passed_on_in_their_order() {
        for args in [
            &["--memory", "4G", "--help"][..],
            &["-h"],
            &["get", "--", "--help"],
            &["--unknown=1", "-x", "-"],
        ] {
            for command in ["kvstore", "kv", "host"] {
                let line = [os(&["./run.sh", command]), os(args)].concat();
                let (Cli::Kvstore(passed) | Cli::Kv(passed) | Cli::Host(passed)) =
                    Cli::try_parse_from(line).unwrap()
                else {
                    panic!("{command} became another command")
                };
                assert_eq!(passed.args, os(args));
            }
        }
    }

    #[test]
    fn help_of_a_command_is_its_own() {
        assert_eq!(
            help_first(os(&["r", "help", "kv", "get"])),
            os(&["r", "kv", "get", "--help"])
        );
        assert_eq!(help_first(os(&["r", "help"])), os(&["r", "--help"]));
        assert_eq!(
            help_first(os(&["r", "kv", "help"])),
            os(&["r", "kv", "help"])
        );
    }

    #[test]
    fn an_image_of_the_users_own_is_noticed() {
        assert!(has_option(&os(&["--image", "x"]), "--image"));
        assert!(has_option(&os(&["--pin", "1", "--image=x"]), "--image"));
        assert!(!has_option(&os(&["--images"]), "--image"));
        assert!(!has_option(&os(&["--", "--image"]), "--image"));
        assert!(asks_for_help(&os(&["--load", "f", "-h"])) && !asks_for_help(&os(&["--", "-h"])));
    }
}
