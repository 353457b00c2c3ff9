//! `background: true` of OpenAI's responses is served here, and is not for the backend: its request is rewritten on the way, in
//! the same number of bytes, and made to stream. What cannot be decided before the bytes have to leave is told, not guessed.
//!
//! ```text
//!   "background":true … "stream":true  …}   ─►   "background":null … "stream":true …}     streams
//!   "background":true … "stream":false …}   ─►   "background":null … "stream":true …}     polls
//!   "background":true … }                   ─►   "stream"    :true … }                    polls
//! ```
//! From the member `background` on, bytes are held back until `stream` or the object's end has told which of these it is.

use super::{Field, RequestFacts, Scanner, State};
use crate::limits::BACKGROUND_HELD_BYTES_MAX;
use std::ops::Range;

/// What the request for a response says about `background`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Background {
    /// It does not ask for it.
    #[default]
    No,
    /// In background, and streamed to its client.
    Streams,
    /// In background; its client is told the id, and comes for the rest.
    Polls,
    /// In background, but the backend could not be made to stream.
    Undecided,
}

/// A member `background: true` whose bytes are held back. All are offsets into the body.
struct Member {
    key: Range<usize>,
    value: Range<usize>,
    /// The value of a `stream` behind it that says no: `false` or `null`.
    refusal: Option<Range<usize>>,
}

/// Rewrites the body of one request while it passes, at any split, and reads its facts. Without `background: true` no byte is
/// altered, and none held back but a name that the end of a piece cuts.
#[derive(Default)]
pub struct Rewriter {
    scanner: Scanner,
    /// The bytes that are held back: what follows `passed`.
    held: Vec<u8>,
    /// Bytes of the body that have left.
    passed: usize,
    /// The name of the outermost member that is being read, until it is known not to matter.
    key: Option<Range<usize>>,
    member: Option<Member>,
    stream_seen: bool,
    /// Its backend streams though the client did not ask for it.
    made_to_stream: bool,
    /// A `background: true` has left as it was.
    lost: bool,
}

impl Rewriter {
    /// A rewriter at the start of a body.
    pub fn new() -> Self {
        Rewriter { scanner: Scanner::new(usize::MAX), ..Rewriter::default() }
    }

    /// Takes the next bytes of the body; gives `out` those that may leave, in order.
    pub fn feed(&mut self, piece: &[u8], mut out: impl FnMut(&[u8])) {
        let base = self.passed + self.held.len();
        let mut at = 0;
        while at < piece.len() && self.scanner.state != State::Finished {
            let before = self.scanner.state;
            at += self.scanner.step(&piece[at..]);
            if let Some((until, how)) = self.follow(before, base + at) {
                let far = base + at - self.first_needed(base + at) > BACKGROUND_HELD_BYTES_MAX;
                self.hold(piece, base, base + at);
                self.rewrite(if far { How::ForNobody } else { how });
                self.pass(piece, base, until, &mut out);
            }
        }
        let end = base + piece.len();
        if end - self.first_needed(end) > BACKGROUND_HELD_BYTES_MAX {
            self.hold(piece, base, end);
            self.rewrite(How::ForNobody);
            self.key = None;
        }
        self.pass(piece, base, self.first_needed(end), &mut out);
        self.hold(piece, base, end);
    }

    /// The body ends here: what is left of one that is cut leaves too.
    pub fn finish(&mut self, mut out: impl FnMut(&[u8])) {
        self.rewrite(How::ForNobody);
        self.key = None;
        let end = self.passed + self.held.len();
        self.pass(b"", end, end, &mut out);
    }

    /// Whether the body's object is over, or is none: nothing is altered or found any more.
    pub fn is_finished(&self) -> bool {
        self.scanner.state == State::Finished
    }

    /// What has been found so far.
    pub fn facts(&self) -> &RequestFacts {
        self.scanner.facts()
    }

    /// What has been found.
    pub fn into_facts(self) -> RequestFacts {
        self.scanner.into_facts()
    }

    /// What it says about `background` if nothing follows.
    pub fn background(&self) -> Background {
        let facts = self.facts();
        match (facts.background, facts.stream) {
            (Some(true), _) if !self.scanner.closed || self.lost => Background::Undecided,
            (Some(true), Some(true)) => Background::Streams,
            (Some(true), _) if self.made_to_stream => Background::Polls,
            (Some(true), _) => Background::Undecided,
            _ => Background::No,
        }
    }

    /// Memory held, bytes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.held.capacity()
    }

    /// Looks at what a step of the scanner that ended at `at` has found. Some: what is held is decided, and leaves up to there.
    fn follow(&mut self, before: State, at: usize) -> Option<(usize, How)> {
        let (state, field) = (self.scanner.state, self.scanner.field);
        let scalar = matches!(before, State::Value | State::Scalar) && state == State::AfterValue;
        match (before, state) {
            _ if before == state || self.scanner.in_stream_options => None,
            (State::Member, State::Key) => {
                self.key = Some(at - 1..at - 1);
                None
            }
            (State::Key, State::Colon) if field == Field::Background => {
                let key = self.key.as_mut()?;
                key.end = at;
                // Of two the last counts; the first needs no decision any more.
                self.member.is_some().then_some((key.start, How::ForNobody))
            }
            (State::Key, State::Colon) => {
                self.key = None;
                None
            }
            (_, State::Finished) => {
                self.key = None;
                self.member
                    .is_some()
                    .then_some((at, if self.scanner.closed { How::AtTheEnd } else { How::ForNobody }))
            }
            (State::Value | State::Scalar, _) if field == Field::Background && state != State::Scalar => {
                let key = self.key.take();
                if !scalar || self.facts().background != Some(true) {
                    return None;
                }
                let Some(key) = key.filter(|key| at - key.start <= BACKGROUND_HELD_BYTES_MAX) else {
                    self.lost = true;
                    return None;
                };
                self.member = Some(Member { key, value: at - b"true".len()..at, refusal: None });
                (self.facts().stream == Some(true)).then_some((at, How::ForNobody))
            }
            (State::Value | State::Scalar, _) if field == Field::Stream && state != State::Scalar => {
                self.stream_seen = true;
                let says = match self.facts().stream {
                    _ if !scalar => None,
                    Some(true) => return self.member.is_some().then_some((at, How::ForNobody)),
                    Some(false) => Some(b"false".len()),
                    None => self.scanner.was_null.then_some(b"null".len()),
                };
                if let Some(member) = &mut self.member {
                    member.refusal = says.map(|bytes| at - bytes..at);
                }
                None
            }
            _ => None,
        }
    }

    /// Rewrites the member that is held back.
    fn rewrite(&mut self, how: How) {
        let Some(Member { key, value, refusal }) = self.member.take() else { return };
        let mut put = |range: Range<usize>, text: &[u8]| {
            let place = &mut self.held[range.start - self.passed..range.end - self.passed];
            place.fill(b' ');
            place[..text.len()].copy_from_slice(text);
        };
        match (how, refusal) {
            (How::AtTheEnd, Some(refusal)) => {
                put(refusal, b"true");
                put(value, b"null");
                self.made_to_stream = true;
            }
            (How::AtTheEnd, None) if !self.stream_seen => {
                put(key, b"\"stream\"");
                self.made_to_stream = true;
            }
            _ => put(value, b"null"),
        }
    }

    /// Where what may not leave yet begins.
    fn first_needed(&self, end: usize) -> usize {
        let key = self.member.as_ref().map(|member| &member.key).or(self.key.as_ref());
        key.map_or(end, |key| key.start)
    }

    /// Holds the piece that begins at `base` up to `until`.
    fn hold(&mut self, piece: &[u8], base: usize, until: usize) {
        let known = self.passed + self.held.len();
        if until > known {
            self.held.extend_from_slice(&piece[known - base..until - base]);
        }
    }

    /// Lets go of all below `until`.
    fn pass(&mut self, piece: &[u8], base: usize, until: usize, out: &mut impl FnMut(&[u8])) {
        let known = self.passed + self.held.len();
        let held = self.held.len().min(until - self.passed);
        if held > 0 {
            out(&self.held[..held]);
            self.held.drain(..held);
        }
        if until > known {
            out(&piece[known - base..until - base]);
        }
        self.passed = until;
        if self.held.is_empty() {
            self.held = Vec::new();
        }
    }
}

/// How a member that was held back leaves.
enum How {
    /// Nobody needs it: the backend streams anyway, or cannot be made to.
    ForNobody,
    /// The object ends here.
    AtTheEnd,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// What leaves, what is found, and what it says at its end.
    fn pass(pieces: &[&[u8]]) -> (Vec<u8>, RequestFacts, Background) {
        let (mut rewriter, mut out) = (Rewriter::new(), Vec::new());
        for piece in pieces {
            rewriter.feed(piece, |bytes| {
                assert!(!bytes.is_empty());
                out.extend_from_slice(bytes);
            });
        }
        let background = rewriter.background();
        rewriter.finish(|bytes| out.extend_from_slice(bytes));
        assert!(rewriter.held.is_empty());
        (out, rewriter.into_facts(), background)
    }

    /// Passes a body at every split into two and into three, and byte by byte: all alike.
    fn at_every_split(body: &str) -> (String, Background) {
        let whole = pass(&[body.as_bytes()]);
        let bytes = body.as_bytes();
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(pass(&pieces), whole, "{body} at {first} and {second}");
            }
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(pass(&single), whole, "{body}");
        assert_eq!(whole.0.len(), bytes.len(), "{body}");
        let mut scanner = Scanner::new(usize::MAX);
        scanner.feed(bytes);
        assert_eq!(whole.1, *scanner.facts(), "{body}");
        (String::from_utf8(whole.0).unwrap(), whole.2)
    }

    #[test]
    fn what_a_backend_sees_at_every_split() {
        use Background::{No, Polls, Streams, Undecided};
        for (body, seen, says) in [
            (r#"{"background":true,"stream":true}"#, r#"{"background":null,"stream":true}"#, Streams),
            (r#"{"stream":true,"background":true}"#, r#"{"stream":true,"background":null}"#, Streams),
            (
                r#"{"stream" : true , "background" : true }"#,
                r#"{"stream" : true , "background" : null }"#,
                Streams,
            ),
            (
                r#"{"b\u0061ckground":true,"stream":true}"#,
                r#"{"b\u0061ckground":null,"stream":true}"#,
                Streams,
            ),
            (
                r#" {"background":true,"a":[1,{"stream":false}],"stream":true} "#,
                r#" {"background":null,"a":[1,{"stream":false}],"stream":true} "#,
                Streams,
            ),
            (r#"{"background":true}"#, r#"{"stream"    :true}"#, Polls),
            (r#"{"background" :true,"input":"x"}"#, r#"{"stream"     :true,"input":"x"}"#, Polls),
            (r#"{"b\u0061ckground":true}"#, r#"{"stream"         :true}"#, Polls),
            (r#"{"background":true,"stream":false}"#, r#"{"background":null,"stream":true }"#, Polls),
            (
                r#"{"background":true,"stream":null,"a":1}"#,
                r#"{"background":null,"stream":true,"a":1}"#,
                Polls,
            ),
            (
                r#"{"background":true,"stream":false,"stream":true}"#,
                r#"{"background":null,"stream":false,"stream":true}"#,
                Streams,
            ),
            (
                r#"{"background":true,"stream":null,"stream":false}"#,
                r#"{"background":null,"stream":null,"stream":true }"#,
                Polls,
            ),
            // Of two with the same name the last counts.
            (r#"{"background":true,"background":false}"#, r#"{"background":null,"background":false}"#, No),
            (r#"{"background":false,"background":true}"#, r#"{"background":false,"stream"    :true}"#, Polls),
            (
                r#"{"background":true,"background":true,"stream":true}"#,
                r#"{"background":null,"background":null,"stream":true}"#,
                Streams,
            ),
            (r#"{"background":true,"background":"x"}"#, r#"{"background":null,"background":"x"}"#, No),
            // Nobody asks for it.
            (r#"{"backgr"#, r#"{"backgr"#, No),
            (r#"{"background":false,"stream":true}"#, r#"{"background":false,"stream":true}"#, No),
            (r#"{"background":null}"#, r#"{"background":null}"#, No),
            (r#"{"background":"true"}"#, r#"{"background":"true"}"#, No),
            (r#"{"background":{"a":true}}"#, r#"{"background":{"a":true}}"#, No),
            (r#"{"background":[true]}"#, r#"{"background":[true]}"#, No),
            (r#"{"metadata":{"background":true}}"#, r#"{"metadata":{"background":true}}"#, No),
            (
                r#"{"stream_options":{"background":true},"stream":true}"#,
                r#"{"stream_options":{"background":true},"stream":true}"#,
                No,
            ),
            (
                r#"{"input":"\"background\":true","a":[{"background":true}]}"#,
                r#"{"input":"\"background\":true","a":[{"background":true}]}"#,
                No,
            ),
            (r#"[{"background":true}]"#, r#"[{"background":true}]"#, No),
            ("", "", No),
            ("{}", "{}", No),
            // It cannot be made to stream, or nobody can tell.
            (r#"{"stream":false,"background":true}"#, r#"{"stream":false,"background":null}"#, Undecided),
            (r#"{"background":true,"stream":1}"#, r#"{"background":null,"stream":1}"#, Undecided),
            (
                r#"{"background":true,"stream":true,"stream":false}"#,
                r#"{"background":null,"stream":true,"stream":false}"#,
                Undecided,
            ),
            (
                r#"{"background":true,"stream":false,"stream":"no"}"#,
                r#"{"background":null,"stream":false,"stream":"no"}"#,
                Undecided,
            ),
            (r#"{"background":true,"stream":true"#, r#"{"background":null,"stream":true"#, Undecided),
            (r#"{"background":true,'stream':true}"#, r#"{"background":null,'stream':true}"#, Undecided),
            (r#"{"background":true"#, r#"{"background":true"#, No),
        ] {
            assert_eq!(at_every_split(body), (seen.to_owned(), says), "{body}");
        }
    }

    #[test]
    fn without_background_only_a_cut_name_is_held_back() {
        let body = br#"{"model":"m","stream":true,"input":[{"a":"b"}],"metadata":{"background":true}}"#;
        for end in 0..body.len() {
            let (mut rewriter, mut out) = (Rewriter::new(), Vec::new());
            rewriter.feed(&body[..end], |bytes| out.extend_from_slice(bytes));
            assert!(rewriter.held.len() <= "\"metadata".len(), "{} at {end}", rewriter.held.len());
            assert_eq!([&out[..], &rewriter.held].concat(), &body[..end]);
            assert!(!rewriter.held.contains(&b':'));
        }
    }

    #[test]
    fn no_more_is_held_back_than_the_limit() {
        let long = "x".repeat(BACKGROUND_HELD_BYTES_MAX);
        let body = |stream: &str| format!(r#"{{"background":true,"input":"{long}"{stream}}}"#);
        for (stream, says) in [(r#","stream":true"#, Background::Streams), ("", Background::Undecided)] {
            let body = body(stream);
            for bytes in [1000, 1 << 16, 1 << 24] {
                let (mut rewriter, mut out, mut most) = (Rewriter::new(), Vec::new(), 0);
                for piece in body.as_bytes().chunks(bytes) {
                    rewriter.feed(piece, |bytes| out.extend_from_slice(bytes));
                    most = most.max(rewriter.held.len());
                }
                assert_eq!((rewriter.background(), rewriter.held.len()), (says, 0));
                assert!(most <= BACKGROUND_HELD_BYTES_MAX);
                assert_eq!(out, body.replace(r#""background":true"#, r#""background":null"#).as_bytes());
            }
        }
        // Neither for a name without end, nor for space behind one.
        for (body, says) in [
            (format!(r#"{{"{long}":1,"background":true,"stream":true}}"#), Background::Streams),
            (
                format!(r#"{{"background":{}true,"stream":true}}"#, " ".repeat(BACKGROUND_HELD_BYTES_MAX)),
                Background::Undecided,
            ),
        ] {
            let (mut rewriter, mut most) = (Rewriter::new(), 0);
            for piece in body.as_bytes().chunks(1000) {
                rewriter.feed(piece, |_| {});
                most = most.max(rewriter.held.len());
            }
            assert_eq!(rewriter.background(), says);
            assert!(most <= BACKGROUND_HELD_BYTES_MAX);
        }
    }

    /// Random bodies at random splits: the backend's JSON is the client's but for the members that had to change.
    #[test]
    fn random_bodies_change_in_nothing_else() {
        let mut seed = 0x5EED_0005_u64;
        let mut below = |bound: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % bound as u64) as usize
        };
        const MEMBERS: [&str; 12] = [
            r#""background":true"#,
            r#""background" : true"#,
            r#""background":false"#,
            r#""backgroun\u0064":true"#,
            r#""stream":true"#,
            r#""stream":false"#,
            r#""stream" : null"#,
            r#""stream_options":{"include_usage":true,"background":true}"#,
            r#""input":"\"background\":true,\u007d""#,
            r#""input":[{"background":true},["stream",true]]"#,
            r#""max_output_tokens":12"#,
            r#""model":"m""#,
        ];
        for round in 0..20_000 {
            let members: Vec<&str> = (0..below(6)).map(|_| MEMBERS[below(MEMBERS.len())]).collect();
            let body = format!("{{{}}}", members.join(", "));
            let (mut pieces, mut rest) = (Vec::new(), body.as_bytes());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(1 + below(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            let (out, _, says) = pass(&pieces);
            assert_eq!(out.len(), body.len(), "round {round}: {body}");
            let asked: Value = serde_json::from_str(&body).unwrap();
            let mut seen: Value =
                serde_json::from_slice(&out).unwrap_or_else(|error| panic!("{error}: {body}"));
            let mut expected = asked.clone();
            match says {
                Background::No => assert_ne!(asked["background"], true),
                Background::Streams => {
                    assert_eq!((&asked["background"], &asked["stream"]), (&true.into(), &true.into()));
                    expected["background"] = Value::Null;
                }
                Background::Polls => {
                    assert!(asked["background"] == true && asked["stream"] != true, "{body}");
                    expected["background"] = Value::Null;
                    expected["stream"] = true.into();
                }
                Background::Undecided => {
                    assert!(asked["background"] == true && asked["stream"] != true, "{body}");
                    continue;
                }
            }
            if says == Background::Polls {
                // An earlier one of that name may be left; none is that asks for it.
                assert_ne!(seen["background"], true, "round {round}: {body}");
                seen["background"] = Value::Null;
            }
            assert_eq!(seen, expected, "round {round}: {body}");
        }
    }
}
