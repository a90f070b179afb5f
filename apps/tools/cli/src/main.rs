//! The `hyv-tools` command.

fn main() -> std::process::ExitCode {
    hyv_tools_cli::run()
}
