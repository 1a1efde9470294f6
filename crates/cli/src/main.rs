//! The `servelab` binary: what was typed, what it means, and the command that it starts.
//!
//! Exit codes: 0 ended as asked, 1 failed while running, 2 wrong usage or settings.

mod args;
mod banner;
mod bench;
mod config_file;
mod device;
mod doctor;
mod fleet;
mod generation_config;
mod load;
mod memory;
mod numbers_command;
mod open_files;
mod page_file;
mod plan;
mod plan_command;
mod plan_simulate;
mod route;
mod secrets;
mod serve;
mod settings;
mod signals;
mod sim_command;
mod simulated;
mod size;
mod traces;
mod up;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Cli, Command};

/// The C library's grows and shrinks the heap of each thread in small steps, one call to the kernel each; the router did
/// that more often than it wrote to a socket.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

fn main() -> ExitCode {
    match Cli::parse().command {
        None => list_commands(),
        Some(Command::Serve(command)) => match serve::run(*command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
        Some(Command::Route(command)) => match route::run(*command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
        Some(Command::Up(command)) => match up::run(command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
        Some(Command::Bench(command)) => match bench::run(&command, &mut std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
        Some(Command::Numbers(command)) => match numbers_command::run(&command, &mut std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
        Some(Command::Sim(command)) => match sim_command::run(&command, &mut std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
        Some(Command::Doctor(command)) => match doctor::run(&command, &mut std::io::stdout()) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) | Err(_) => ExitCode::from(FAILED),
        },
        Some(Command::Plan(command)) => match plan_command::run(&command, &mut std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, error.is_usage()),
        },
    }
}

/// The run without arguments says what can be run.
fn list_commands() -> ExitCode {
    let help = Cli::command().render_help();
    match write!(std::io::stdout(), "{help}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(FAILED),
    }
}

fn complain(error: &dyn std::error::Error, is_usage: bool) -> ExitCode {
    // Standard error may be closed; the exit code still tells.
    let _ = writeln!(std::io::stderr(), "servelab: {error}");
    ExitCode::from(if is_usage { WRONG_USAGE } else { FAILED })
}
