//! Incremental decoder of Server-Sent Events, as far as the checks need it.
//!
//! Lines end with LF or CRLF; a lone CR (which WHATWG also allows) is not taken for a line end: none of the measured
//! servers sends it. An event that the end of the stream cuts off is never told, as the specification asks.

/// Bytes kept of one event or of a line that is not yet whole. Beyond it the stream is counted as malformed.
pub const EVENT_BYTES_MAX: usize = 4 << 20;

/// One dispatched event.
#[derive(Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// Its `data` lines, joined by LF.
    pub data: &'a [u8],
    /// The `id` it carried itself.
    pub id: Option<&'a [u8]>,
}

/// Decodes one stream.
#[derive(Debug, Default)]
pub struct Decoder {
    /// A line whose end has not arrived.
    partial: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    id: Vec<u8>,
    has_id: bool,
    comments: u64,
    overlong: bool,
}

impl Decoder {
    /// Takes bytes, and hands over each event that they complete.
    pub fn feed(&mut self, mut bytes: &[u8], mut on_event: impl FnMut(Event<'_>)) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            if self.partial.is_empty() {
                self.line(&bytes[..end], &mut on_event);
            } else {
                let mut line = std::mem::take(&mut self.partial);
                line.extend_from_slice(&bytes[..end]);
                self.line(&line, &mut on_event);
            }
            bytes = &bytes[end + 1..];
        }
        if self.partial.len() + bytes.len() > EVENT_BYTES_MAX {
            self.overlong = true;
            self.partial = Vec::new();
        } else {
            self.partial.extend_from_slice(bytes);
        }
    }

    /// Comment lines so far.
    pub fn comments(&self) -> u64 {
        self.comments
    }

    /// Whether the stream stands between two events.
    pub fn at_boundary(&self) -> bool {
        self.partial.is_empty() && !self.has_data && !self.has_id
    }

    /// Whether an event was larger than [`EVENT_BYTES_MAX`].
    pub fn overlong(&self) -> bool {
        self.overlong
    }

    fn line(&mut self, line: &[u8], on_event: &mut impl FnMut(Event<'_>)) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if self.has_data {
                let id = self.has_id.then_some(self.id.as_slice());
                on_event(Event { data: &self.data, id });
            }
            self.data.clear();
            self.id.clear();
            self.has_data = false;
            self.has_id = false;
        } else if let Some(value) = field(line, b"data") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            if self.data.len() + value.len() > EVENT_BYTES_MAX {
                self.overlong = true;
            } else {
                self.data.extend_from_slice(value);
            }
        } else if let Some(value) = field(line, b"id") {
            self.has_id = true;
            self.id.clear();
            self.id.extend_from_slice(value);
        } else if line.starts_with(b":") {
            self.comments += 1;
        }
    }
}

fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let rest = line.strip_prefix(name)?;
    match rest.first() {
        None => Some(rest),
        Some(b':') => Some(rest[1..].strip_prefix(b" ").unwrap_or(&rest[1..])),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b": hello\n\nid: 1\ndata: one\n\nevent: x\r\ndata:two\r\ndata:  three\r\n\r\nid: 3\n\ndata\n\ndatax: no\n\ndata: cut";

    fn decode(pieces: &[&[u8]]) -> (Vec<(String, Option<String>)>, Decoder) {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for piece in pieces {
            decoder.feed(piece, |event| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                events.push((text(event.data), event.id.map(text)));
            });
        }
        (events, decoder)
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let expected = vec![
            ("one".to_owned(), Some("1".to_owned())),
            ("two\n three".to_owned(), None),
            (String::new(), None),
        ];
        assert_eq!(decode(&[STREAM]).0, expected);
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(decode(&bytes).0, expected);
        for cut in 0..STREAM.len() {
            let (events, decoder) = decode(&[&STREAM[..cut], &STREAM[cut..]]);
            assert_eq!(events, expected, "cut at {cut}");
            assert_eq!(decoder.comments(), 1);
            assert!(!decoder.at_boundary());
        }
    }

    #[test]
    fn a_finished_stream_stands_at_a_boundary() {
        let (events, decoder) = decode(&[b"data: a\n\n"]);
        assert_eq!(events.len(), 1);
        assert!(decoder.at_boundary());
        assert!(!decode(&[b"data: a\n"]).1.at_boundary());
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let mut decoder = Decoder::default();
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..6 {
            decoder.feed(&piece, |_| panic!("no event"));
        }
        assert!(decoder.overlong());
        assert!(decoder.partial.len() <= EVENT_BYTES_MAX);
    }
}
