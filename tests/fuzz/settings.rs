//! A configuration file, and behind a NUL each flags (`--name=text`) and variables (`NAME=text`) that go over it. Any text at
//! all gives settings, or readable complaints that name their places. Settings can be carried out, and what
//! `tokenring check` prints of them is a file that gives the same ones again.

use super::configuration::load::{self, Effective, Layers};
use super::configuration::plan::Plan;
use super::configuration::table::ALL;
use super::configuration::{Machine, Problem, file, page};
use super::values::one_line;
use std::collections::HashMap;

/// Lines of files.
pub const WORDS: &[&str] = &[
    "listen = \"127.0.0.1:1\"\n",
    "listen_tls = [\"[::]:2\"]\n",
    "upstream = [\"http://a\", \"https://b:1/c\"]\n",
    "upstream = []\n",
    "tls_cert = \"a.pem\"\ntls_key = [\"b.pem\"]\n",
    "tls_client_ca = \"c.pem\"\n",
    "tls_client_auth = \"required\"\n",
    "upstream_ca = \"d.pem\"\n",
    "upstream_tls_insecure = true\n",
    "upstream_server_name = \"x.example\"\n",
    "cpus = [0, 1]\n",
    "cpus = \"0-2\"\n",
    "shards = 2\n",
    "conns_max = 100\n",
    "ring_depth = 0x40\n",
    "total_ms = \"5m\"\n",
    "resume_window = \"64KiB\"\n",
    "on_leave = \"finish\"\n",
    "on_leave_max = \"own\"\n",
    "durable = true\n",
    "data_dir = \"/d\"\n",
    "durable_prefix = \"off\"\n",
    "event_bytes_max = 1_024\n",
    "admin = \"unix:/a\"\n",
    "cors = \"https://a.example http://b\"\n",
    "log_level = \"warn,shard=debug\"\n",
    "[[listener]]\naddress = \"0.0.0.0:3\"\n",
    "tls = true\n",
    "cert = \"e.pem\"\nkey = \"f.pem\"\n",
    "client_ca = \"g.pem\"\n",
    "[[upstream]]\nurl = \"https://e\"\n",
    "ca = \"h.pem\"\n",
    "tls_insecure = true\n",
    "server_name = \"y\"\n",
    "[[route]]\npath = \"/v1\"\n",
    "[[route]]\npath = \"/\"\n",
    "name = \"n\"\n",
    "upstreams = [0, \"http://f\", { url = \"https://g\", ca = \"i.pem\" }]\n",
    "upstreams = []\n",
    "\0--listen=127.0.0.1:0",
    "\0--upstream=https://h",
    "\0--shards=3",
    "\0TOKENRING_BACKLOG=7",
    "\0RUST_LOG=debug",
    "\0TOKENRING_CPUS=1",
    "# comment\n",
    "\"\"\"",
    "'''",
    "\\u0001",
    " = ",
    "1979-05-27",
    "inf",
];

/// The longest complaint: nobody reads a page of one.
const MESSAGE_BYTES_MAX: usize = 1024;

fn machine() -> Machine {
    Machine { parallelism: 4, cpus: vec![0, 1, 2, 3], descriptors: 20_000, memory: 8 << 30 }
}

/// The target.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut parts = text.split('\0');
    let text = parts.next().unwrap_or_default();
    let file = match file::read("f.toml", text) {
        Ok(file) => file,
        Err(problems) => {
            let places = complaints(&problems, text);
            assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{problems:?}");
            return;
        }
    };
    let mut flags = HashMap::new();
    let mut variables: HashMap<&str, &str> = HashMap::new();
    for part in parts {
        let Some((name, value)) = part.split_once('=') else { continue };
        match name.strip_prefix("--") {
            Some(name) => {
                let Some(setting) = ALL.iter().find(|setting| setting.name == name) else { continue };
                if let Ok(value) = setting.kind.parse(value) {
                    flags.insert(setting.name, value);
                }
            }
            None => drop(variables.insert(name, value)),
        }
    }
    let variable = |name: &str| variables.get(name).map(|&value| value.to_owned());
    let names = variables.keys().map(|&name| name.to_owned()).collect();
    let machine = machine();
    let layers = Layers { flags: &flags, variable: &variable, variables: names, file, machine: &machine };
    let effective = match load::load(layers) {
        Ok(effective) => effective,
        Err(problems) => {
            complaints(&problems, text);
            return;
        }
    };
    for (name, value) in &flags {
        let setting = ALL.iter().find(|setting| setting.name == *name);
        assert_eq!(setting.map(|setting| effective.values.get(setting)), Some(value), "flags go before all");
    }
    let plan = Plan::new(&effective, &machine, 1, 1);
    assert!(plan.worst_case().total() > 0);
    let printed = page::effective(&effective);
    let again = loaded(&printed, &machine);
    for setting in ALL {
        assert_eq!(again.values.get(setting), effective.values.get(setting), "{} again", setting.name);
    }
    let same = Plan::new(&again, &machine, 1, 1);
    assert_eq!(format!("{same:?}"), format!("{plan:?}"), "{printed}");
}

fn loaded(text: &str, machine: &Machine) -> Effective {
    let words = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>();
    let none = |_: &str| None;
    let flags = HashMap::new();
    file::read("again.toml", text)
        .and_then(|file| {
            load::load(Layers { flags: &flags, variable: &none, variables: Vec::new(), file, machine })
        })
        .unwrap_or_else(|problems| panic!("{:?} of {text}", words(problems)))
}

/// Every complaint is readable; gives the line and column of each that begins with one, which the file has.
fn complaints(problems: &[Problem], text: &str) -> Vec<Option<(usize, usize)>> {
    assert!(!problems.is_empty());
    let lines: Vec<&str> = text.split('\n').collect();
    let place = |problem: &Problem| {
        let problem = problem.to_string();
        one_line(&problem);
        assert!(problem.len() <= MESSAGE_BYTES_MAX, "{} bytes", problem.len());
        let (line, rest) = problem.strip_prefix("f.toml:")?.split_once(':')?;
        let (column, _) = rest.split_once(": ")?;
        let (line, column) = (line.parse().ok()?, column.parse().ok()?);
        assert!((1..=lines.len()).contains(&line), "{problem}");
        assert!((1..=lines[line - 1].chars().count() + 1).contains(&column), "{problem}");
        Some((line, column))
    };
    problems.iter().map(place).collect()
}
