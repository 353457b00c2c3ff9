//! Finding an event by its id in bytes that we have written: blocks with dense ids, and heartbeats without. Kept answers are
//! searched when a client comes back, so that nothing need be noted when they are written.

use super::lines;
use memchr::memmem;

/// Where the event with this id ends in `bytes`, which begin with a chunk or a block; `first_id` is the id of the first event
/// in them. Each event is one chunk if they are chunks.
pub(crate) fn end_of_event(bytes: &[u8], chunked: bool, first_id: u64, id: u64) -> Option<usize> {
    let mut next = first_id;
    let mut at = 0;
    while let Some((block, whole_bytes)) = if chunked { chunk(&bytes[at..]) } else { block(&bytes[at..]) } {
        at += whole_bytes;
        if has_id(block, next) {
            if next == id {
                return Some(at);
            }
            next += 1;
        }
    }
    None
}

/// Every block of `bytes`, which are whole blocks of ours: where it lies, with its chunk's framing, what it says, and its id if it
/// is an event; that of the first one is `first_id`.
pub(crate) fn each_block(
    bytes: &[u8],
    chunked: bool,
    first_id: u64,
    mut on: impl FnMut((usize, usize), &[u8], Option<u64>),
) {
    let (mut at, mut next) = (0, first_id);
    while let Some((block, whole_bytes)) = if chunked { chunk(&bytes[at..]) } else { block(&bytes[at..]) } {
        let is_event = has_id(block, next);
        on((at, at + whole_bytes), block, is_event.then_some(next));
        next += u64::from(is_event);
        at += whole_bytes;
    }
}

/// Whether the block has this line; another's id may stand in it as well.
fn has_id(block: &[u8], id: u64) -> bool {
    let line = format!("id: {id}");
    lines(block).any(|found| found == line.as_bytes())
}

/// The first chunk's data, and the bytes of the chunk.
fn chunk(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let line_bytes = memmem::find(bytes, b"\r\n")?;
    let data_bytes = usize::from_str_radix(std::str::from_utf8(&bytes[..line_bytes]).ok()?, 16).ok()?;
    let start = line_bytes + 2;
    let end = start.checked_add(data_bytes)?.checked_add(2)?;
    Some((&bytes.get(start..end)?[..data_bytes], end))
}

/// The first block, with its blank line.
fn block(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let mut at = 0;
    for line in lines(bytes) {
        at += line.len();
        at += if bytes[at..].starts_with(b"\r\n") { 2 } else { 1 };
        if line.is_empty() {
            return Some((&bytes[..at], at));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_events_have_none() {
        for bytes in
            [&b""[..], b"5", b"5\r\nhello", b"zz\r\nid: 1\r\n\r\n", b"ffffffffffffffff\r\nx", b"0\r\n\r\n"]
        {
            assert_eq!(end_of_event(bytes, true, 1, 1), None, "{bytes:?}");
        }
        for bytes in [&b""[..], b"id: 1", b"id: 1\ndata: x\n", b"\n\n\n", b"id: 2\n\n"] {
            assert_eq!(end_of_event(bytes, false, 1, 1), None, "{bytes:?}");
        }
    }

    #[test]
    fn every_line_end_is_one() {
        for end in ["\n", "\r\n", "\r"] {
            let event = |id: u64| format!("id: {id}{end}data: id: 2{end}{end}");
            let bytes = [event(1), format!(": beat{end}"), event(2), event(3)].concat();
            let expected = [event(1).len(), bytes.len() - event(3).len(), bytes.len()];
            for (nth, expected) in expected.into_iter().enumerate() {
                assert_eq!(
                    end_of_event(bytes.as_bytes(), false, 1, nth as u64 + 1),
                    Some(expected),
                    "{end:?}"
                );
            }
        }
    }
}
