//! Chooses a listener's certificate by the name that a client asks for.

use super::files::Pair;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::collections::HashMap;
use std::sync::Arc;

/// The certificates of a listener by name. Several may be for one name, with keys of different kinds.
#[derive(Debug)]
pub(crate) struct ByName {
    /// As they were given; the first is shown to clients that ask for no name, or for one that none is for.
    all: Vec<Arc<CertifiedKey>>,
    exact: HashMap<String, Vec<usize>>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Vec<usize>>,
}

impl ByName {
    pub(crate) fn new(pairs: &[&Pair]) -> Self {
        let (mut exact, mut wildcard) = (HashMap::new(), HashMap::new());
        for (index, pair) in pairs.iter().enumerate() {
            for name in &pair.facts.names {
                let (names, name) = match name.strip_prefix("*.") {
                    Some(parent) => (&mut wildcard, parent),
                    None => (&mut exact, name.as_str()),
                };
                let of: &mut Vec<usize> = names.entry(name.to_owned()).or_default();
                if !of.contains(&index) {
                    of.push(index);
                }
            }
        }
        ByName { all: pairs.iter().map(|pair| Arc::clone(&pair.certified)).collect(), exact, wildcard }
    }

    /// The certificates for a name, the best first. A wildcard stands for one label (RFC 9525 section 6.3).
    fn candidates(&self, name: Option<&str>) -> &[usize] {
        let Some(name) = name else { return &[] };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let parent = || name.split_once('.').and_then(|(_, parent)| self.wildcard.get(parent));
        self.exact.get(&name).or_else(parent).map_or(&[], Vec::as_slice)
    }

    /// The certificate for a name whose key signs as the client can check; if there is none, any for the name: the handshake
    /// then fails with the right alert.
    fn choose(
        &self,
        name: Option<&str>,
        signs: impl Fn(&CertifiedKey) -> bool,
    ) -> Option<&Arc<CertifiedKey>> {
        let named = || self.candidates(name).iter().filter_map(|&index| self.all.get(index));
        let suits = |key: &&Arc<CertifiedKey>| signs(key);
        match named().next() {
            Some(first) => named().find(suits).or(Some(first)),
            None => self.all.iter().find(suits).or_else(|| self.all.first()),
        }
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let signs = |key: &CertifiedKey| key.key.choose_scheme(hello.signature_schemes()).is_some();
        self.choose(hello.server_name(), signs).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Authority;
    use super::*;

    fn by_name(names: &[&[&str]]) -> ByName {
        let authority = Authority::new("a");
        let pairs: Vec<Pair> = names.iter().map(|names| authority.issue(names).pair()).collect();
        ByName::new(&pairs.iter().collect::<Vec<_>>())
    }

    #[test]
    fn a_name_finds_its_certificate_else_the_first() {
        let by_name = by_name(&[
            &["default.example"],
            &["a.example", "*.a.example"],
            &["*.b.example", "special.a.example"],
            &["10.0.0.1"],
        ]);
        let chosen = |name: Option<&str>| {
            let chosen = by_name.choose(name, |_| true).unwrap();
            by_name.all.iter().position(|key| Arc::ptr_eq(key, chosen)).unwrap()
        };
        for (name, expected) in [
            ("a.example", 1),
            ("A.Example.", 1),
            ("x.a.example", 1),
            // The name itself goes before a wildcard.
            ("special.a.example", 2),
            ("x.b.example", 2),
            // A wildcard is neither two labels nor none.
            ("x.y.b.example", 0),
            ("b.example", 0),
            ("example", 0),
            ("unknown.example", 0),
        ] {
            assert_eq!(chosen(Some(name)), expected, "{name}");
        }
        assert_eq!(chosen(None), 0);
    }

    #[test]
    fn of_several_for_one_name_the_one_is_shown_that_the_client_can_check() {
        let by_name = by_name(&[&["d.example"], &["a.example"], &["a.example"]]);
        let choose = |name, suits: &[usize]| {
            let signs =
                |key: &CertifiedKey| suits.iter().any(|&index| std::ptr::eq(&*by_name.all[index], key));
            let chosen = by_name.choose(name, signs).unwrap();
            by_name.all.iter().position(|key| Arc::ptr_eq(key, chosen)).unwrap()
        };
        assert_eq!(choose(Some("a.example"), &[0, 1, 2]), 1);
        assert_eq!(choose(Some("a.example"), &[0, 2]), 2);
        // None suits: the handshake fails, and not for a wrong name.
        assert_eq!(choose(Some("a.example"), &[]), 1);
        assert_eq!(choose(None, &[2]), 2);
        assert_eq!(choose(None, &[]), 0);
    }
}
