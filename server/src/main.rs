//! tokenring: a streaming proxy for AI token streams. This crate is the operator's side: command line, configuration,
//! lifecycle, control thread, admin, telemetry. The data plane is `shard`.
#![forbid(unsafe_code)]

mod admin;
mod cli;
mod clock;
mod control;
mod data_dir;
mod doctor;
mod exit;
mod logs;
mod serve;
mod settings;
mod streams;
mod tls;

use cli::Request;
use exit::{Exit, Fatal};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let request = match cli::parse(std::env::args_os()) {
        Ok(request) => request,
        Err(error) => {
            let exit = if error.use_stderr() { Exit::Usage } else { Exit::Success };
            // Nowhere to report a closed terminal to.
            error.print().ok();
            return exit.into();
        }
    };
    match run(request) {
        Ok(exit) => exit.into(),
        Err(fatal) => {
            let text: String = fatal.message.lines().map(|line| format!("tokenring: {line}\n")).collect();
            std::io::stderr().write_all(text.as_bytes()).ok();
            fatal.exit.into()
        }
    }
}

fn run(request: Request) -> Result<Exit, Fatal> {
    match request {
        Request::Serve(matches) => {
            let machine = settings::Machine::detect();
            serve::serve(&cli::configuration(&matches, &machine)?, &machine)
        }
        Request::Check(matches) => {
            let machine = settings::Machine::detect();
            let effective = cli::configuration(&matches, &machine)?;
            let plan = settings::plan::Plan::new(&effective, &machine, 0, 0);
            let store = tls::Store::load(&plan.tls)
                .map_err(|problems| Fatal::new(Exit::Configuration, problems.join("\n")))?;
            if let Some(path) = &plan.data_dir {
                data_dir::check(path)?;
            }
            let now = clock::since_1970().as_secs();
            let page = settings::page::effective(&effective)
                + &tls::status::page(&store.status(), &plan, now)
                + &settings::page::memory(&plan.worst_case());
            print(page.as_bytes())
        }
        Request::Doctor => {
            let (report, exit) = doctor::report(&shard::uring::probe(), &doctor::authorities());
            print(report.as_bytes()).map(|_| exit)
        }
        Request::Streams(question) => streams::answer(&question, &mut std::io::stdout().lock()),
        Request::ConfigDoc => print(settings::page::config_page().as_bytes()),
        Request::MetricsDoc => print(admin::metrics_page().as_bytes()),
        Request::Man => print(&cli::man_page()),
        Request::Completions(shell) => print(&cli::completions(shell)),
    }
}

/// Writes to stdout. A reader that has gone (`| head`) is no failure.
fn print(bytes: &[u8]) -> Result<Exit, Fatal> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Fatal::internal(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(Exit::Success),
    }
}
