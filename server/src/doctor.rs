//! `tokenring doctor`: what the data plane needs of this machine, what was found, and the remedy.

use crate::exit::Exit;
use shard::uring::ProbeItem;

/// Whether the system has the certificates of authorities that `https` backends are checked with. Without them tokenring can
/// run all the same: with plain backends, or with --upstream-ca.
pub(crate) fn authorities() -> ProbeItem {
    let name = "certificate authorities";
    match crate::tls::system_roots() {
        Ok(roots) => {
            let remarks: Vec<_> = roots.remarks.iter().map(|remark| format!("; {remark}")).collect();
            let found = format!("{}, {}{}", roots.store.len(), roots.source, remarks.concat());
            ProbeItem { name, ok: true, found, remedy: String::new() }
        }
        Err(error) => {
            let remedy = "https backends need it: install ca-certificates, or give --upstream-ca".to_owned();
            ProbeItem { name, ok: true, found: error, remedy }
        }
    }
}

/// The report, and 69 when something needed is missing.
pub(crate) fn report(needed: &[ProbeItem], authorities: &ProbeItem) -> (String, Exit) {
    let items: Vec<&ProbeItem> = needed.iter().chain([authorities]).collect();
    let width = items.iter().map(|item| item.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for item in &items {
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
        let advice = item("authorities", true, "install ca-certificates");
        let (text, exit) = report(&items, &advice);
        assert_eq!(exit, Exit::Unavailable);
        assert!(text.contains("ok       kernel       found\n"), "{text}");
        assert!(text.contains("advice: install ca-certificates"), "{text}");
        assert!(text.contains("remedy: sysctl kernel.io_uring_disabled=0"));
        assert_eq!(missing(&items), ["io_uring: found; sysctl kernel.io_uring_disabled=0"]);
        assert_eq!(report(&items[..1], &advice).1, Exit::Success);
    }
}
