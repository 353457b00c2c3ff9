//! `tokenring doctor`: what the data plane needs of this machine, what was found, and the remedy.

use crate::exit::Exit;
use shard::uring::ProbeItem;

/// The report, and 69 when something needed is missing.
pub(crate) fn report(items: &[ProbeItem]) -> (String, Exit) {
    let width = items.iter().map(|item| item.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for item in items {
        let mark = if item.ok { "ok     " } else { "MISSING" };
        text.push_str(&format!("{mark}  {:<width$}  {}\n", item.name, item.found));
        if !item.remedy.is_empty() {
            let arrow = if item.ok { "advice" } else { "remedy" };
            text.push_str(&format!("         {:<width$}  {arrow}: {}\n", "", item.remedy));
        }
    }
    let missing = items.iter().filter(|item| !item.ok).count();
    if missing == 0 {
        text.push_str("\ntokenring can run here.\n");
        (text, Exit::Success)
    } else {
        text.push_str(&format!("\ntokenring cannot run here: {missing} missing.\n"));
        (text, Exit::Unavailable)
    }
}

/// What is missing, in one line each, for a start that the kernel refused.
pub(crate) fn missing(items: &[ProbeItem]) -> Vec<String> {
    items
        .iter()
        .filter(|item| !item.ok)
        .map(|item| format!("{}: {}; {}", item.name, item.found, item.remedy))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &'static str, ok: bool, remedy: &str) -> ProbeItem {
        ProbeItem { name, ok, found: "found".to_owned(), remedy: remedy.to_owned() }
    }

    #[test]
    fn what_is_missing_has_a_remedy_and_a_code() {
        let items = [item("kernel", true, ""), item("io_uring", false, "sysctl kernel.io_uring_disabled=0")];
        let (text, exit) = report(&items);
        assert_eq!(exit, Exit::Unavailable);
        assert!(text.contains("ok       kernel    found\n"));
        assert!(text.contains("remedy: sysctl kernel.io_uring_disabled=0"));
        assert_eq!(missing(&items), ["io_uring: found; sysctl kernel.io_uring_disabled=0"]);
        assert_eq!(report(&items[..1]).1, Exit::Success);
    }
}
