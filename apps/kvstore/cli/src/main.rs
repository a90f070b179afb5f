//! See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvstore_cli::commands::run()
}
