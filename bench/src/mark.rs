//! The mark inside each event's text, by which the load generator knows whose event it is, which one, and how old.
//!
//! `~stream,sequence,due_ns,late_ns~`: it stands in the content of a delta, not beside it, so that it survives every gateway
//! that reads and rewrites the JSON around it.

/// The longest mark: four numbers of 20 digits and what stands between them.
pub const MARK_BYTES_MAX: usize = 4 * 20 + 5;

/// What one event says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The number the client gave its request.
    pub stream: u64,
    /// Place within the stream: 1, 2, 3, …
    pub sequence: u64,
    /// When the backend meant to send it (CLOCK_MONOTONIC, ns). A late backend does not move it: no coordinated omission.
    pub due_ns: u64,
    /// How much later than that the backend wrote it, in ns.
    pub late_ns: u64,
}

impl Mark {
    /// Appends the mark.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(b'~');
        push_number(out, self.stream);
        out.push(b',');
        push_number(out, self.sequence);
        out.push(b',');
        push_number(out, self.due_ns);
        out.push(b',');
        push_number(out, self.late_ns);
        out.push(b'~');
    }

    /// Finds the mark in an event's data; `None` when there is none.
    pub fn decode(data: &[u8]) -> Option<Self> {
        let start = memchr::memchr(b'~', data)? + 1;
        let mut numbers = [0u64; 4];
        let mut rest = data[start..].iter();
        for (index, number) in numbers.iter_mut().enumerate() {
            let end = if index == 3 { b'~' } else { b',' };
            let mut digits = 0;
            loop {
                match *rest.next()? {
                    digit @ b'0'..=b'9' => {
                        *number = number.checked_mul(10)?.checked_add(u64::from(digit - b'0'))?;
                        digits += 1;
                    }
                    byte if byte == end && digits > 0 => break,
                    _ => return None,
                }
            }
        }
        let [stream, sequence, due_ns, late_ns] = numbers;
        Some(Self { stream, sequence, due_ns, late_ns })
    }
}

/// Appends a number in decimal, without an allocation.
pub fn push_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0u8; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_again_in_json() {
        let mark = Mark { stream: 7, sequence: 0, due_ns: u64::MAX, late_ns: 1234 };
        let mut data = br#"{"delta":{"content":""#.to_vec();
        mark.encode(&mut data);
        data.extend_from_slice(br#"xx~"}}"#);
        assert_eq!(Mark::decode(&data), Some(mark));
    }

    #[test]
    fn what_is_no_mark_is_none() {
        for data in ["", "~", "~1,2,3~", "~1,2,3,4", "~1,,3,4~", "~1,2,x,4~", "~99999999999999999999,1,1,1~"]
        {
            assert_eq!(Mark::decode(data.as_bytes()), None, "{data}");
        }
    }
}
