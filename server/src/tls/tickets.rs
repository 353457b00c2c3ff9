//! Session tickets: the state of a TLS session, sealed and kept by the client. The keys do not change while they are shared
//! between shards, so that a handshake takes no lock; the control thread makes new ones ([`Keys::next`]) and hands them out
//! in a new [`shard::settings::TlsSet`].
//!
//! A ticket is `key name (16) | nonce (12) | sealed state | tag (16)`; the key's name is authenticated with it.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::server::ProducesTickets;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How long a key seals tickets. As long again it opens them, so that every ticket lives at least this long.
pub(crate) const KEY_AGE: Duration = Duration::from_secs(6 * 3600);
/// What clients are told (RFC 8446 section 4.6.1): not longer than a ticket sealed with a key's last breath is taken.
const LIFETIME_S: u32 = KEY_AGE.as_secs() as u32;
const NAME_BYTES: usize = 16;
const TAG_BYTES: usize = 16;
/// A ticket's length is told in 16 bits.
const TICKET_BYTES_MAX: usize = u16::MAX as usize;

/// The keys of one listener's tickets: two listeners that ask for different client certificates must not take each other's.
#[derive(Clone)]
pub(crate) struct Keys {
    current: Arc<Key>,
    previous: Option<Arc<Key>>,
}

struct Key {
    /// Random; tells keys apart.
    name: [u8; NAME_BYTES],
    key: LessSafeKey,
}

impl Key {
    fn new() -> Result<Arc<Self>, String> {
        let random = SystemRandom::new();
        let (mut name, mut secret) = ([0; NAME_BYTES], [0; 32]);
        let failed = |_| "no random numbers for the keys of session tickets".to_owned();
        random.fill(&mut name).and_then(|()| random.fill(&mut secret)).map_err(failed)?;
        let key = UnboundKey::new(&AES_256_GCM, &secret).map_err(failed)?;
        Ok(Arc::new(Key { name, key: LessSafeKey::new(key) }))
    }

    fn seal(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let length = NAME_BYTES + NONCE_LEN + plain.len() + TAG_BYTES;
        if length > TICKET_BYTES_MAX {
            return None;
        }
        // Random nonces of 96 bits are safe for 2^32 tickets of one key (NIST SP 800-38D section 8.3): 200,000 a second.
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut ticket = Vec::with_capacity(length);
        ticket.extend(self.name);
        ticket.extend(nonce);
        ticket.extend(plain);
        let (_, sealed) = ticket.split_at_mut(NAME_BYTES + NONCE_LEN);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(self.name), sealed).ok()?;
        ticket.extend(tag.as_ref());
        Some(ticket)
    }

    fn open(&self, nonce: [u8; NONCE_LEN], sealed: &[u8]) -> Option<Vec<u8>> {
        let mut plain = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let length = self.key.open_in_place(nonce, Aad::from(self.name), &mut plain).ok()?.len();
        plain.truncate(length);
        Some(plain)
    }
}

impl Keys {
    /// Fresh ones: no earlier ticket is taken.
    pub(crate) fn new() -> Result<Self, String> {
        Ok(Keys { current: Key::new()?, previous: None })
    }

    /// A new key to seal with; what the last one sealed is still taken.
    pub(crate) fn next(&self) -> Result<Self, String> {
        Ok(Keys { current: Key::new()?, previous: Some(Arc::clone(&self.current)) })
    }
}

/// Names are no secret, keys are.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            [Some(&self.current), self.previous.as_ref()].into_iter().flatten().map(|key| key.name).collect();
        f.debug_struct("Keys").field("names", &names).finish_non_exhaustive()
    }
}

impl ProducesTickets for Keys {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME_S
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.current.seal(plain)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_at_checked(NAME_BYTES)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN)?;
        let keys = [Some(&self.current), self.previous.as_ref()];
        // The name is sent in clear, so that how long a comparison takes tells nothing.
        let key = keys.into_iter().flatten().find(|key| key.name == name)?;
        key.open(nonce.try_into().ok()?, sealed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_opened_by_its_key_and_by_the_next_keys_but_no_longer() {
        let first = Keys::new().unwrap();
        let ticket = first.encrypt(b"state").unwrap();
        assert_eq!(ticket.len(), 16 + 12 + 5 + 16);
        assert_eq!(first.decrypt(&ticket).unwrap(), b"state");
        let second = first.next().unwrap();
        assert_eq!(second.decrypt(&ticket).unwrap(), b"state");
        assert_eq!(first.decrypt(&second.encrypt(b"state").unwrap()), None, "of a key that it never had");
        assert_eq!(second.next().unwrap().decrypt(&ticket), None, "two keys old");
        assert_eq!(Keys::new().unwrap().decrypt(&ticket), None, "another listener's");
    }

    #[test]
    fn a_ticket_in_which_any_bit_was_changed_is_refused() {
        let keys = Keys::new().unwrap().next().unwrap();
        let ticket = keys.encrypt(b"who it is").unwrap();
        for bit in 0..ticket.len() * 8 {
            let mut changed = ticket.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(keys.decrypt(&changed), None, "bit {bit}");
        }
        // As the previous key's, which has another name.
        let mut renamed = ticket.clone();
        renamed[..16].copy_from_slice(&keys.previous.as_ref().unwrap().name);
        assert_eq!(keys.decrypt(&renamed), None);
    }

    #[test]
    fn every_length_is_taken_or_refused() {
        let keys = Keys::new().unwrap();
        for length in [0, 1, 15, 16, 17, 255, 4096, TICKET_BYTES_MAX - 44] {
            let plain = vec![7; length];
            assert_eq!(keys.decrypt(&keys.encrypt(&plain).unwrap()).unwrap(), plain);
        }
        assert_eq!(keys.encrypt(&vec![7; TICKET_BYTES_MAX - 43]), None);
        let ticket = keys.encrypt(b"").unwrap();
        for length in 0..ticket.len() {
            assert_eq!(keys.decrypt(&ticket[..length]), None, "{length} bytes");
        }
        let mut longer = ticket;
        longer.push(0);
        assert_eq!(keys.decrypt(&longer), None);
    }

    #[test]
    fn no_two_tickets_are_alike() {
        let keys = Keys::new().unwrap();
        let tickets: std::collections::HashSet<_> =
            (0..1000).map(|_| keys.encrypt(b"state").unwrap()).collect();
        assert_eq!(tickets.len(), 1000);
        assert_eq!(keys.lifetime(), 21_600);
        assert!(keys.enabled() && !format!("{keys:?}").contains("LessSafeKey"));
    }
}
