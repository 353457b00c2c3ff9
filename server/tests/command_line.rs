//! Exit codes and messages of the commands, and that the generated pages are fresh.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod common;

use common::{code, run, stderr, stdout, tokenring};
use std::path::{Path, PathBuf};

/// A configuration file of this test, removed at its end.
struct Config(PathBuf);

impl Config {
    fn new(name: &str, text: &str) -> Config {
        let path = std::env::temp_dir().join(format!("tokenring-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Config(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

#[test]
fn an_unknown_flag_is_a_usage_error_with_a_guess() {
    let output = run(&["--sheds", "2"]);
    assert_eq!(code(&output), 64);
    assert!(stderr(&output).contains("'--shards'"), "{}", stderr(&output));
}

#[test]
fn a_bad_value_of_a_flag_is_a_usage_error() {
    let output = run(&["serve", "--ring-depth", "1000"]);
    assert_eq!(code(&output), 64);
    assert!(stderr(&output).contains("expected a power of two from 64 to 32768"), "{}", stderr(&output));
}

#[test]
fn help_and_version_succeed() {
    for flag in ["--help", "-h", "--version"] {
        assert_eq!(code(&run(&[flag])), 0, "{flag}");
    }
    assert!(stdout(&run(&["--version"])).starts_with("tokenring "));
}

#[test]
fn a_bad_configuration_names_line_column_and_likely_key() {
    let config = Config::new("bad", "backlog = 100\n\n  ring_dept = 64\nbuffers = 1000\n");
    for command in [&["check"][..], &["serve"], &[]] {
        let output = tokenring().args(command).args(["--config", config.path()]).output().unwrap();
        assert_eq!(code(&output), 78);
        let text = stderr(&output);
        let place = format!("{}:3:3: unknown key `ring_dept`; did you mean `ring_depth`?", config.path());
        assert!(text.contains(&place), "{text}");
        assert!(
            text.contains(":4:11: buffers: expected a power of two from 16 to 32768, found 1000"),
            "{text}"
        );
    }
}

#[test]
fn a_missing_configuration_and_a_bad_variable_are_configuration_errors() {
    let output = run(&["check", "--config", "/no/such/file.toml"]);
    assert_eq!(code(&output), 78);
    assert!(
        stderr(&output).contains("/no/such/file.toml: cannot read the configuration"),
        "{}",
        stderr(&output)
    );
    let output = tokenring().arg("check").env("TOKENRING_SHARDS", "many").output().unwrap();
    assert_eq!(code(&output), 78);
    assert!(stderr(&output).contains("TOKENRING_SHARDS: expected an integer"), "{}", stderr(&output));
}

#[test]
fn check_prints_every_value_with_its_source() {
    let config = Config::new(
        "good",
        "upstream = [\"http://a:1\"]\nbacklog = 100\n[[route]]\npath = \"/v1\"\ntotal_ms = 5\n",
    );
    let output = tokenring()
        .args(["check", "--config", config.path(), "--shards", "1", "--admin", "off"])
        .env("TOKENRING_BUFFERS", "64")
        .env("RUST_LOG", "debug")
        .output()
        .unwrap();
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let text = stdout(&output);
    let line = |start: &str| {
        let found = text
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap_or_else(|| panic!("no {start} in {text}"));
        found.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("backlog"), format!("backlog = 100 # {}:2:11", config.path()));
    assert_eq!(line("buffers"), "buffers = 64 # environment TOKENRING_BUFFERS");
    assert_eq!(line("log_level"), "log_level = \"debug\" # environment RUST_LOG");
    assert_eq!(line("shards"), "shards = 1 # flag --shards");
    assert_eq!(line("ring_depth"), "ring_depth = 1024 # default");
    assert!(text.contains("path = \"/v1\""));
    // What check prints is itself a configuration.
    let again = Config::new("again", &text);
    assert_eq!(code(&run(&["check", "--config", again.path()])), 0);
}

#[test]
fn a_port_in_use_is_unavailable() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for arguments in
        [["--listen", &address, "--admin", "off"], ["--listen", "127.0.0.1:0", "--admin", &address]]
    {
        let output = run(&arguments);
        assert_eq!(code(&output), 69);
        assert!(stderr(&output).contains(&address), "{}", stderr(&output));
    }
}

#[test]
fn man_page_and_completions_are_printed() {
    assert!(stdout(&run(&["man"])).contains(".TH tokenring"));
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert_eq!(code(&output), 0);
        assert!(stdout(&output).contains("ring-depth"));
    }
}

#[test]
fn generated_pages_are_fresh() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    for (command, page) in [("config-doc", "CONFIG.md"), ("metrics-doc", "METRICS.md")] {
        let committed = std::fs::read_to_string(docs.join(page)).unwrap();
        let fresh = stdout(&run(&[command]));
        assert!(committed == fresh, "docs/{page} is stale: cargo run -- {command} > docs/{page}");
    }
}
