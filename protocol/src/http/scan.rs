//! The bytes of a head, read once from left to right: first-line parts and header fields, and the character classes.
//! Every function answers `Ok(None)` for "more bytes are needed", and names the first offending byte otherwise.

use super::{HeaderSlots, Refusal, Version};

const TOKEN: u8 = 1;
const VALUE: u8 = 2;
const TARGET: u8 = 4;

const CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        // RFC 9110 section 5.6.2: tchar.
        let token = b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            );
        // RFC 9110 section 5.5: HTAB, SP, VCHAR, obs-text.
        let value = b == b'\t' || (b >= b' ' && b != 0x7f);
        let target = b.is_ascii_graphic() && b != b'#';
        classes[byte] =
            if token { TOKEN } else { 0 } | if value { VALUE } else { 0 } | if target { TARGET } else { 0 };
        byte += 1;
    }
    classes
};

/// RFC 9110 `tchar`.
pub(super) fn is_token(byte: u8) -> bool {
    CLASSES[byte as usize] & TOKEN != 0
}

/// A byte that may stand in a field value or a reason phrase.
pub(super) fn is_value(byte: u8) -> bool {
    CLASSES[byte as usize] & VALUE != 0
}

/// Visible ASCII, but not the `#` of a fragment.
pub(super) fn is_target(byte: u8) -> bool {
    CLASSES[byte as usize] & TARGET != 0
}

/// How many leading bytes are of a class; `None` when all are, so that the run may go on.
pub(super) fn run(bytes: &[u8], class: impl Fn(u8) -> bool) -> Option<usize> {
    bytes.iter().position(|byte| !class(*byte))
}

/// Where a line may end: the offset after CRLF at `at`. Any other byte there is `otherwise`, a lone CR or LF itself.
pub(super) fn line_end(bytes: &[u8], at: usize, otherwise: Refusal) -> Result<Option<usize>, Refusal> {
    match (bytes.get(at), bytes.get(at + 1)) {
        (None, _) | (Some(b'\r'), None) => Ok(None),
        (Some(b'\r'), Some(b'\n')) => Ok(Some(at + 2)),
        (Some(b'\r'), Some(_)) => Err(Refusal::BareCr),
        (Some(b'\n'), _) => Err(Refusal::BareLf),
        (Some(_), _) => Err(otherwise),
    }
}

/// As [`line_end`], where the line must not end yet: CRLF is `otherwise` too.
pub(super) fn no_line_end<T>(bytes: &[u8], at: usize, otherwise: Refusal) -> Result<Option<T>, Refusal> {
    match line_end(bytes, at, otherwise)? {
        None => Ok(None),
        Some(_) => Err(otherwise),
    }
}

/// `HTTP/1.x` at `at`; another digit.digit is an unsupported version, anything else `otherwise`.
pub(super) fn version(
    bytes: &[u8],
    at: usize,
    otherwise: Refusal,
) -> Result<Option<(Version, usize)>, Refusal> {
    let form = b"HTTP/d.d";
    for (offset, expected) in form.iter().enumerate() {
        let Some(found) = bytes.get(at + offset) else { return Ok(None) };
        let fits = if *expected == b'd' { found.is_ascii_digit() } else { found == expected };
        if !fits {
            return no_line_end(bytes, at + offset, otherwise);
        }
    }
    let end = at + form.len();
    match (bytes[end - 3], bytes[end - 1]) {
        (b'1', b'0') => Ok(Some((Version::Http10, end))),
        (b'1', b'1') => Ok(Some((Version::Http11, end))),
        _ => Err(Refusal::UnsupportedVersion),
    }
}

/// The header section that begins at `at` (RFC 9112 section 5), of at most so many fields: fills the slots, and gives the offset
/// after its blank line.
pub(super) fn fields<'b>(
    bytes: &'b [u8],
    mut at: usize,
    slots: &mut HeaderSlots<'b>,
    headers_max: usize,
) -> Result<Option<usize>, Refusal> {
    slots.clear();
    loop {
        match bytes.get(at) {
            None => return Ok(None),
            Some(b'\r' | b'\n') => return line_end(bytes, at, Refusal::BareCr),
            Some(b' ' | b'\t') if slots.count == 0 => return Err(Refusal::LeadingWhitespace),
            Some(b' ' | b'\t') => return Err(Refusal::ObsFold),
            Some(_) => {}
        }
        if slots.count >= headers_max {
            return Err(Refusal::TooManyHeaders);
        }
        let Some(name_bytes) = run(&bytes[at..], is_token) else { return Ok(None) };
        let colon = at + name_bytes;
        match bytes[colon] {
            b':' if name_bytes > 0 => {}
            b' ' | b'\t' => return Err(Refusal::SpaceBeforeColon),
            _ => return no_line_end(bytes, colon, Refusal::BadHeaderName),
        }
        let Some(value_bytes) = run(&bytes[colon + 1..], is_value) else { return Ok(None) };
        let value_end = colon + 1 + value_bytes;
        let Some(next) = line_end(bytes, value_end, Refusal::BadHeaderValue)? else { return Ok(None) };
        let name = ascii(&bytes[at..colon], Refusal::BadHeaderName)?;
        slots.push(httparse::Header { name, value: trim(&bytes[colon + 1..value_end]) });
        at = next;
    }
}

/// Bytes already known to be ASCII, as text.
pub(super) fn ascii(bytes: &[u8], otherwise: Refusal) -> Result<&str, Refusal> {
    std::str::from_utf8(bytes).map_err(|_| otherwise)
}

/// Without leading and trailing OWS (SP and HTAB only: `trim_ascii` would take more).
pub(super) fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// The elements of a comma-separated list, empty ones included, without their OWS. Quoted strings are not
/// understood: no field that we read this way may contain one.
pub(super) fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(trim)
}
