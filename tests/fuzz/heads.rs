//! What the targets for request and response heads share: a naive reading of a head, and the dictionary.

use protocol::http::Framing;

pub(super) const WORDS: &[&str] = &[
    "GET",
    "POST",
    "HEAD",
    "OPTIONS",
    "CONNECT",
    "PRI * HTTP/2.0",
    "/",
    "*",
    "/v1/chat/completions?a=b",
    "http://h/",
    "https://[::1]:80/",
    " HTTP/1.1\r\n",
    " HTTP/1.0\r\n",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.1 204",
    "HTTP/1.1 304 ",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.0 101 ",
    "\r\n",
    "\r\n\r\n",
    "\n",
    "\r\n ",
    "\r\n\t",
    ": ",
    " :",
    "Host: a\r\n",
    "Host",
    "Content-Length",
    "Content-Length: 5\r\n",
    "content_length: 5\r\n",
    "Content-Length: 18446744073709551616\r\n",
    "Content-Length: 5, 5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding",
    "transfer_encoding: chunked\r\n",
    "chunked",
    ", chunked",
    "gzip, chunked",
    "identity",
    "Connection: close\r\n",
    "Connection: ",
    "keep-alive",
    "close, host, content-length",
    "Upgrade: h2c\r\n",
    "TE: trailers\r\n",
    "Trailer: x\r\n",
    "Expect: 100-continue\r\n",
    "Accept: text/event-stream;q=0\r\n",
    "Accept-Encoding: gzip\r\n",
    "Content-Type: text/event-stream; charset=utf-8\r\n",
    "Content-Encoding: gzip\r\n",
    "Keep-Alive: timeout=5, max=3\r\n",
    "Via: 1.1 x\r\n",
    "%2e%2e/",
    "%41:65536",
    "\u{e9}",
];

/// A head cut at its CRLFs and colons, without a look at what is legal.
#[derive(Debug)]
pub(super) struct Naive<'b> {
    pub(super) first_line: &'b [u8],
    /// Names as sent, values without SP and HTAB around them.
    pub(super) fields: Vec<(&'b [u8], &'b [u8])>,
    /// Up to the end of the blank line.
    pub(super) bytes: usize,
}

impl<'b> Naive<'b> {
    /// `None` without a blank line, or with a line that has no colon.
    pub(super) fn of(input: &'b [u8]) -> Option<Self> {
        let mut start = 0;
        while input[start..].starts_with(b"\r\n") {
            start += 2;
        }
        let head_bytes = input[start..].windows(4).position(|four| four == b"\r\n\r\n")?;
        let text = &input[start..start + head_bytes];
        let mut lines = split(text, b"\r\n").into_iter();
        let first_line = lines.next()?;
        let mut fields = Vec::new();
        for line in lines {
            let colon = line.iter().position(|byte| *byte == b':')?;
            fields.push((&line[..colon], trimmed(&line[colon + 1..])));
        }
        Some(Naive { first_line, fields, bytes: start + head_bytes + 4 })
    }

    /// The values of all fields of that name.
    pub(super) fn all(&self, name: &str) -> Vec<&'b [u8]> {
        let same = |field: &&(&[u8], &[u8])| field.0.eq_ignore_ascii_case(name.as_bytes());
        self.fields.iter().filter(same).map(|field| field.1).collect()
    }

    /// The framing that the fields declare without any ambiguity, if they do.
    pub(super) fn framing(&self) -> Option<Framing> {
        match (&self.all("content-length")[..], &self.all("transfer-encoding")[..]) {
            ([], []) => Some(Framing::None),
            ([length], []) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
                std::str::from_utf8(length).ok()?.parse().ok().map(Framing::Length)
            }
            ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") => Some(Framing::Chunked),
            _ => None,
        }
    }

    /// The fields that an intermediary passes on (RFC 9110 section 7.6.1), without those whose lower-case name is listed.
    pub(super) fn end_to_end(&self, without: &[&str]) -> Vec<(&'b [u8], &'b [u8])> {
        let mut named: Vec<Vec<u8>> = without.iter().map(|name| name.as_bytes().to_vec()).collect();
        for value in self.all("connection") {
            named.extend(value.split(|byte| *byte == b',').map(|name| trimmed(name).to_ascii_lowercase()));
        }
        const HOP_BY_HOP: [&str; 11] = [
            "connection",
            "content-length",
            "http2-settings",
            "keep-alive",
            "proxy-authenticate",
            "proxy-authorization",
            "proxy-connection",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
        ];
        let hop_by_hop = |name: &[u8]| {
            let name: Vec<u8> = name.to_ascii_lowercase();
            let dashed: Vec<u8> = name.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte }).collect();
            HOP_BY_HOP.iter().chain(without).any(|hop| hop.as_bytes() == dashed) || named.contains(&name)
        };
        self.fields.iter().filter(|field| !hop_by_hop(field.0)).copied().collect()
    }
}

pub(super) fn trimmed(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// The parts between separators.
pub(super) fn split<'b>(text: &'b [u8], separator: &[u8]) -> Vec<&'b [u8]> {
    let (mut parts, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.windows(separator.len()).position(|window| window == separator) {
        parts.push(&rest[..at]);
        rest = &rest[at + separator.len()..];
    }
    parts.push(rest);
    parts
}

/// An RFC 9110 token.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    let legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !bytes.is_empty() && bytes.iter().all(legal)
}

/// Field content: HTAB, SP, VCHAR and obs-text.
pub(super) fn is_content(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == b'\t' || (*byte >= 0x20 && *byte != 0x7f))
}

/// Prefix lengths that are tried: all of a short head; of a long one those around its line ends, and evenly spaced ones.
pub(super) fn prefix_lengths(input: &[u8]) -> Vec<usize> {
    let step = input.len() / 64 + 1;
    let near_line_end = |at: &usize| {
        let around = &input[at.saturating_sub(2)..input.len().min(at + 2)];
        around.contains(&b'\n') || around.contains(&b'\r')
    };
    (0..=input.len()).filter(|at| input.len() < 200 || at % step == 0 || near_line_end(at)).collect()
}
