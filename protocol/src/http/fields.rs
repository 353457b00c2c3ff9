//! What the fields of a head mean that requests and responses share: framing and the Connection options.
//! Framing follows RFC 9112 section 6, and refuses where that section leaves a choice.

use super::scan::{list, trim};
use super::{CONNECTION_TOKENS_MAX, Refusal, Version};

/// What Content-Length and Transfer-Encoding say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Declared {
    Nothing,
    Length(u64),
    Chunked,
}

/// Collects what frames a message and what its connection options are, field by field.
#[derive(Default)]
pub(super) struct Fields<'b> {
    length_fields: usize,
    length: &'b [u8],
    coding_fields: usize,
    codings: usize,
    codings_empty: usize,
    chunked: usize,
    chunked_last: bool,
    connection_tokens: usize,
    close: bool,
    keep_alive: bool,
}

impl<'b> Fields<'b> {
    /// Takes one field; false when it is none of those collected here.
    pub(super) fn take(&mut self, header: &httparse::Header<'b>) -> Result<bool, Refusal> {
        if header.name.eq_ignore_ascii_case("content-length") {
            self.length_fields += 1;
            self.length = header.value;
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            self.coding_fields += 1;
            for coding in list(header.value) {
                self.codings += 1;
                self.codings_empty += usize::from(coding.is_empty());
                self.chunked_last = coding.eq_ignore_ascii_case(b"chunked");
                self.chunked += usize::from(self.chunked_last);
            }
        } else if header.name.eq_ignore_ascii_case("connection") {
            for option in list(header.value) {
                self.connection_tokens += 1;
                self.close |= option.eq_ignore_ascii_case(b"close");
                self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            }
            if self.connection_tokens > CONNECTION_TOKENS_MAX {
                return Err(Refusal::TooManyConnectionTokens);
            }
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// The framing that the fields declare. What both fields together mean is not settled between
    /// implementations, nor is a repeated length; both are what request smuggling is made of.
    pub(super) fn declared(&self, version: Version) -> Result<Declared, Refusal> {
        if self.coding_fields == 0 {
            return self.length();
        }
        if self.length_fields > 0 {
            return Err(Refusal::ConflictingLengths);
        }
        if version == Version::Http10 {
            return Err(Refusal::TransferCodingInHttp10);
        }
        if self.codings_empty > 0 {
            return Err(Refusal::BadTransferCoding);
        }
        match self.chunked {
            0 => Err(Refusal::UnknownTransferCoding),
            1 if !self.chunked_last => Err(Refusal::ChunkedNotLast),
            1 if self.codings > 1 => Err(Refusal::UnknownTransferCoding),
            1 => Ok(Declared::Chunked),
            _ => Err(Refusal::ChunkedTwice),
        }
    }

    /// Whether the connection persists as far as the head says (RFC 9112 section 9.3).
    pub(super) fn keeps_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep_alive)
    }

    fn length(&self) -> Result<Declared, Refusal> {
        match self.length_fields {
            0 => Ok(Declared::Nothing),
            1 => length(self.length).map(Declared::Length),
            _ => Err(Refusal::RepeatedLength),
        }
    }
}

/// A Content-Length value: `1*DIGIT` (RFC 9110 section 8.6), nothing else.
pub(super) fn length(value: &[u8]) -> Result<u64, Refusal> {
    if value.contains(&b',') {
        return Err(Refusal::RepeatedLength);
    }
    decimal(value).ok_or(Refusal::BadLength)
}

/// `1*DIGIT` below 2^64.
pub(super) fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0u64, |sum, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// The media type of a field value, without its parameters.
pub(super) fn media_type(value: &[u8]) -> &[u8] {
    trim(value.split(|byte| *byte == b';').next().unwrap_or_default())
}

/// The first field of that name.
pub(super) fn find<'b>(headers: &[httparse::Header<'b>], name: &str) -> Option<&'b [u8]> {
    headers.iter().find(|header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}
