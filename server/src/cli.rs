//! The command line, made from the table of settings: commands, flags, help, man page, completions.

use crate::exit::{Exit, Fatal};
use crate::settings::address::ServerAddress;
use crate::settings::file::{self, File};
use crate::settings::load::{self, Effective, Layers};
use crate::settings::table::{ALL, Group, Setting};
use crate::settings::value::Value;
use crate::settings::{Machine, Problem};
use crate::streams::{Client, Of, Question, Tail, What};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Bytes of a configuration file; more is another file given by mistake.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Names the configuration file when no flag does.
const CONFIG_VARIABLE: &str = "TOKENRING_CONFIG";

const AFTER_HELP: &str = "\
Every flag is also an environment variable (--ring-depth: TOKENRING_RING_DEPTH) and a key of the file (ring_depth).
Flags go before the environment, the environment before the file.

Examples:
  tokenring                                          the built-in demo model on 127.0.0.1:8080
  tokenring --upstream http://127.0.0.1:8000         relay vLLM, llama.cpp, Ollama, SGLang ...
  tokenring serve --config tokenring.toml --listen 0.0.0.0:8080
  tokenring --listen-tls 0.0.0.0:443 --tls-cert fullchain.pem --tls-key privkey.pem --upstream https://api.example.com

Signals:
  TERM, INT   drain: accept no more, let streams finish until --drain-deadline-ms; a second one ends them now
  HUP         read certificates and keys again
  QUIT        print the state as JSON and stop at once

Exit codes:
  0 all streams ended in peace   1 streams were cut short   64 usage   65 a data directory is damaged
  69 cannot bind, data directory in use, or io_uring refused
  70 internal   78 configuration";

/// What the user asked for.
pub(crate) enum Request {
    Serve(ArgMatches),
    Check(ArgMatches),
    Doctor,
    Streams(Question),
    ConfigDoc,
    MetricsDoc,
    Man,
    Completions(clap_complete::Shell),
}

/// The whole command line.
pub(crate) fn command() -> Command {
    let root = Command::new("tokenring")
        .version(env!("CARGO_PKG_VERSION"))
        .about("A streaming proxy for AI token streams")
        .long_about(
            "tokenring stands between clients (OpenAI and Anthropic SDKs, browsers, curl) and model backends, and relays tokens \
             as they are produced, with deadlines for every phase of a stream, heartbeats, backpressure and drain. \
             Without a command it serves.",
        )
        .after_help(AFTER_HELP)
        .max_term_width(110)
        .args_conflicts_with_subcommands(true)
        .disable_help_subcommand(true)
        .subcommand(with_settings(Command::new("serve").about("Serve (the default)").after_help(AFTER_HELP)))
        .subcommand(with_settings(
            Command::new("check").about("Check a configuration, and print every value with where it came from"),
        ))
        .subcommand(Command::new("doctor").about("Check kernel, io_uring, locked memory and descriptors, with remedies"))
        .subcommand(streams_command())
        .subcommand(Command::new("config-doc").about("Print the page of all settings (docs/CONFIG.md)"))
        .subcommand(Command::new("metrics-doc").about("Print the page of all metrics (docs/METRICS.md)"))
        .subcommand(Command::new("man").about("Print the man page (roff)"))
        .subcommand(
            Command::new("completions").about("Print completions for a shell").arg(
                Arg::new("shell")
                    .value_name("SHELL")
                    .required(true)
                    .value_parser(value_parser!(clap_complete::Shell)),
            ),
        );
    with_settings(root)
}

fn streams_command() -> Command {
    let directory = Arg::new("data-dir")
        .long("data-dir")
        .value_name("DIR")
        .value_parser(value_parser!(PathBuf))
        .global(true)
        .help("A data directory, whoever writes it [env: TOKENRING_DATA_DIR]");
    let server = Arg::new("server")
        .long("server")
        .value_name("URL")
        .value_parser(|text: &str| ServerAddress::parse(text))
        .global(true)
        .help("A server that runs: its admin address (http://127.0.0.1:9180, unix:PATH), or one that clients use");
    let ca =
        Arg::new("ca").long("ca").value_name("FILE").value_parser(value_parser!(PathBuf)).global(true).help(
            "Authorities that an https server's certificate must come from, PEM, instead of the system's",
        );
    let json = || Arg::new("json").long("json").action(ArgAction::SetTrue).help("As JSON");
    let which = || {
        Arg::new("stream")
            .value_name("ID|PATH")
            .required(true)
            .help("The stream's id (Tokenring-Stream), or the path of a durable one, prefix included")
    };
    Command::new("streams")
        .about("Look at the streams of a server, or at the durable ones of a data directory (docs/OPERATING.md)")
        .subcommand_required(true)
        .args([server, ca, directory])
        .subcommand(Command::new("list").about("All streams").arg(json()))
        .subcommand(Command::new("show").about("What is known of one stream").args([which(), json()]))
        .subcommand(
            Command::new("tail")
                .about("The events of one stream as they come, until its end; of a data directory, its last messages")
                .arg(which())
                .args([
                    Arg::new("after")
                        .long("after")
                        .value_name("ID")
                        .help("Begin behind this event (of a durable stream: at this offset, or now)"),
                    Arg::new("data")
                        .long("data")
                        .action(ArgAction::SetTrue)
                        .help("The events' data alone, without ids and names"),
                    Arg::new("follow")
                        .long("follow")
                        .short('f')
                        .action(ArgAction::SetTrue)
                        .help("Wait for what comes; of a server's streams that is always so"),
                    Arg::new("lines")
                        .long("lines")
                        .short('n')
                        .value_name("COUNT")
                        .value_parser(value_parser!(usize))
                        .default_value("10")
                        .help("How many of the last messages of a data directory's stream"),
                ])
                .after_help(TAIL_HELP),
        )
        .subcommand(
            Command::new("export")
                .about("What is held of one stream, as a read from its start gives it")
                .arg(which()),
        )
        .subcommand(Command::new("verify").about(
            "Check every record of a data directory; exit code 65 if something was lost",
        ))
}

const TAIL_HELP: &str = "\
Exit codes:
  0 the stream ended well, or was closed   1 it ended with an error, was stopped, or is gone
  64 there is no such stream   65 some of its events are not held any more   69 the server cannot be reached";

fn streams_question(matches: &ArgMatches) -> Result<Question, clap::Error> {
    let refuse = |kind: ErrorKind, why: &str| Err(streams_command().error(kind, why));
    let named = matches.get_one::<PathBuf>("data-dir").cloned();
    let server = matches.get_one::<ServerAddress>("server").cloned();
    let variable =
        || std::env::var_os("TOKENRING_DATA_DIR").filter(|path| !path.is_empty()).map(PathBuf::from);
    let of = match (server, named) {
        (Some(_), Some(_)) => {
            return refuse(ErrorKind::ArgumentConflict, "--server URL or --data-dir DIR, not both");
        }
        (Some(address), None) => {
            let authorities = matches.get_one::<PathBuf>("ca").cloned();
            Of::Server(Client { address, authorities })
        }
        (None, named) => match named.or_else(variable) {
            Some(directory) => Of::Directory(directory),
            None => {
                let why = "--server URL or --data-dir DIR is required";
                return refuse(ErrorKind::MissingRequiredArgument, why);
            }
        },
    };
    let which = |matches: &ArgMatches| matches.get_one::<String>("stream").cloned().unwrap_or_default();
    let what = match matches.subcommand() {
        Some(("list", matches)) => What::List { json: matches.get_flag("json") },
        Some(("show", matches)) => What::Show { which: which(matches), json: matches.get_flag("json") },
        Some(("tail", matches)) => What::Tail(Tail {
            which: which(matches),
            after: matches.get_one::<String>("after").cloned(),
            data: matches.get_flag("data"),
            last: matches.get_one("lines").copied().unwrap_or(10),
            follow: matches.get_flag("follow"),
        }),
        Some(("export", matches)) => What::Export(which(matches)),
        _ => What::Verify,
    };
    Ok(Question { of, what })
}

fn with_settings(command: Command) -> Command {
    let config = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help_heading(Group::Serving.heading())
        .help("TOML file with settings and routes")
        .long_help(format!("TOML file with settings and routes (docs/CONFIG.md).\n[env: {CONFIG_VARIABLE}]"));
    command.arg(config).args(ALL.iter().map(|setting| flag(setting)))
}

fn flag(setting: &'static Setting) -> Arg {
    let default = setting.default_words();
    let also = setting.also_variable.map(|name| format!(", {name}")).unwrap_or_default();
    let choices = match setting.kind {
        crate::settings::value::Kind::Choice(words) => format!("[one of: {}] ", words.join(", ")),
        _ => String::new(),
    };
    let arg = Arg::new(setting.name)
        .long(setting.name)
        .value_name(setting.kind.value_name())
        .help_heading(setting.group.heading())
        .help(format!("{} {choices}[default: {default}]", setting.summary()))
        .long_help(format!(
            "{}\n{choices}[default: {default}] [env: {}{also}]",
            setting.doc,
            setting.variable()
        ))
        .value_parser(move |text: &str| setting.kind.parse(text))
        .action(if setting.kind.repeatable() { ArgAction::Append } else { ArgAction::Set });
    match setting.alias {
        Some(alias) => arg.alias(alias),
        None => arg,
    }
}

/// Reads the command line. `Err` carries what clap has to say, also `--help` and `--version`.
pub(crate) fn parse(arguments: impl Iterator<Item = std::ffi::OsString>) -> Result<Request, clap::Error> {
    let mut matches = command().try_get_matches_from(arguments)?;
    Ok(match matches.remove_subcommand() {
        None => Request::Serve(matches),
        Some((name, matches)) => match name.as_str() {
            "serve" => Request::Serve(matches),
            "check" => Request::Check(matches),
            "doctor" => Request::Doctor,
            "streams" => Request::Streams(streams_question(&matches)?),
            "config-doc" => Request::ConfigDoc,
            "metrics-doc" => Request::MetricsDoc,
            "man" => Request::Man,
            "completions" => match matches.get_one("shell") {
                Some(&shell) => Request::Completions(shell),
                None => unreachable!("clap requires SHELL"),
            },
            other => unreachable!("clap knows no command {other}"),
        },
    })
}

/// The effective configuration of a command line, the environment and the file they name.
pub(crate) fn configuration(matches: &ArgMatches, machine: &Machine) -> Result<Effective, Fatal> {
    let mut flags: HashMap<&'static str, Value> = HashMap::new();
    for setting in ALL {
        for value in matches.get_many::<Value>(setting.name).unwrap_or_default() {
            match (flags.get_mut(setting.name), value) {
                (Some(Value::Listen(all)), Value::Listen(more)) => all.extend(more),
                (Some(Value::Files(all)), Value::Files(more)) => all.extend(more.iter().cloned()),
                (Some(Value::Upstreams(all)), Value::Upstreams(more)) => all.extend(more.iter().cloned()),
                _ => {
                    flags.insert(setting.name, value.clone());
                }
            }
        }
    }
    let variable = |name: &str| std::env::var(name).ok();
    let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
    let path = matches.get_one::<PathBuf>("config").cloned();
    let path = path.or_else(|| variable(CONFIG_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from));
    let file = path.as_deref().map_or_else(|| Ok(File::default()), read_file);
    file.and_then(|file| load::load(Layers { flags: &flags, variable: &variable, variables, file, machine }))
        .map_err(|problems| {
            let lines: Vec<_> = problems.iter().map(ToString::to_string).collect();
            Fatal::new(Exit::Configuration, lines.join("\n"))
        })
}

fn read_file(path: &Path) -> Result<File, Vec<Problem>> {
    let name = path.display().to_string();
    let problem = |why: String| vec![Problem::new(format!("{name}: cannot read the configuration: {why}"))];
    let size = std::fs::metadata(path).map_err(|error| problem(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(problem(format!("it has {size} bytes; at most {FILE_BYTES_MAX} are read")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
    file::read(&name, &text)
}

/// The man page, as roff.
pub(crate) fn man_page() -> Vec<u8> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command())
        .render(&mut page)
        .unwrap_or_else(|error| unreachable!("a vector takes all: {error}"));
    page
}

/// The completion script.
pub(crate) fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "tokenring", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
        assert!(!man_page().is_empty());
    }

    #[test]
    fn bare_flags_serve() {
        let arguments =
            ["tokenring", "--upstream", "http://a:1", "--upstream", "http://b:2", "--drain-deadline", "5s"];
        let Request::Serve(matches) = parse(arguments.iter().map(Into::into)).unwrap() else {
            panic!("not serve")
        };
        let machine = Machine { parallelism: 1, cpus: vec![0], descriptors: 20_000, memory: 8 << 30 };
        let effective = configuration(&matches, &machine).unwrap();
        assert_eq!(effective.upstreams.len(), 2);
        assert_eq!(effective.values.integer(&crate::settings::table::DRAIN_DEADLINE_MS), 5000);
    }

    #[test]
    fn a_bad_value_says_what_was_expected() {
        let error =
            parse(["tokenring", "--ring-depth", "1000"].iter().map(Into::into)).err().unwrap().to_string();
        assert!(error.contains("expected a power of two from 64 to 32768, found \"1000\""), "{error}");
        let error =
            parse(["tokenring", "--upstream", "ftp://x"].iter().map(Into::into)).err().unwrap().to_string();
        assert!(error.contains("only the schemes http and https"), "{error}");
    }
}
