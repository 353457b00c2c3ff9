//! What went wrong, as a client is told: status, stable code, sentence, culprit; and the names that the OpenAI and
//! Anthropic dialects have for it. How it is written on the wire is the dialect's business (`dialect/`).

/// Who is at fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Culprit {
    /// The request or its sender.
    Client,
    /// The model backend.
    Upstream,
    /// This process: overload, drain, a bug.
    Gateway,
    /// The configuration.
    Operator,
}

impl Culprit {
    /// The word for labels and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Culprit::Client => "client",
            Culprit::Upstream => "upstream",
            Culprit::Gateway => "gateway",
            Culprit::Operator => "operator",
        }
    }
}

/// What went wrong, as told to a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// HTTP status, 400 to 599; the one it would have had when it is told inside a stream.
    pub status: u16,
    /// Stable, snake_case, for programs: `upstream_reset`, `first_token_timeout`.
    pub code: &'static str,
    /// For people: who is at fault, what happened, whether a retry can help.
    pub message: &'static str,
    /// Who is at fault.
    pub culprit: Culprit,
    /// Whether the same request may succeed when sent again.
    pub retry_helps: bool,
}

impl Fault {
    /// `error.type` as OpenAI clients know it, by status (platform.openai.com/docs/guides/error-codes; the timeout and
    /// overload types are the ones that OpenAI-compatible servers use).
    pub fn openai_type(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// `error.type` as Anthropic clients know it, by status (docs.anthropic.com/en/api/errors).
    pub fn anthropic_type(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            409 => "conflict_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}, {})", self.message, self.code, self.culprit.name())
    }
}

impl std::error::Error for Fault {}

/// Appends `s` as a JSON string, quotes included (RFC 8259 section 7). Line ends are escaped, so the result fits on one
/// SSE data line.
pub fn write_json_string(out: &mut Vec<u8>, s: &str) {
    out.push(b'"');
    write_json_text(out, s);
    out.push(b'"');
}

/// Appends `s` escaped for the inside of a JSON string.
pub(crate) fn write_json_text(out: &mut Vec<u8>, s: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = s.as_bytes();
    let mut plain_from = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let short = match byte {
            b'"' => b'"',
            b'\\' => b'\\',
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0..=0x1F => b'u',
            _ => continue,
        };
        out.extend_from_slice(&bytes[plain_from..at]);
        plain_from = at + 1;
        out.extend_from_slice(&[b'\\', short]);
        if short == b'u' {
            out.extend_from_slice(&[b'0', b'0', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    out.extend_from_slice(&bytes[plain_from..]);
}

/// Appends a number in decimal.
pub(crate) fn write_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_strings_read_back_as_they_were() {
        let every_control: String = (0..=0x7F_u8).map(char::from).collect();
        for text in ["", "plain", "quote \" back \\ slash", "é → 🦀 \u{2028}", &every_control] {
            let mut out = Vec::new();
            write_json_string(&mut out, text);
            assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
            assert!(out.iter().all(|&byte| byte >= 0x20), "one line: {out:?}");
        }
    }

    #[test]
    fn numbers_are_decimal() {
        for number in [0, 7, 10, 65_535, u64::MAX] {
            let mut out = Vec::new();
            write_number(&mut out, number);
            assert_eq!(out, number.to_string().into_bytes());
        }
    }

    #[test]
    fn every_status_has_a_type_in_both_dialects() {
        let types = |status| {
            let fault =
                Fault { status, code: "c", message: "m", culprit: Culprit::Upstream, retry_helps: true };
            (fault.openai_type(), fault.anthropic_type())
        };
        assert_eq!(types(400), ("invalid_request_error", "invalid_request_error"));
        assert_eq!(types(413), ("invalid_request_error", "request_too_large"));
        assert_eq!(types(429), ("rate_limit_error", "rate_limit_error"));
        assert_eq!(types(500), ("server_error", "api_error"));
        assert_eq!(types(502), ("server_error", "api_error"));
        assert_eq!(types(503), ("overloaded_error", "overloaded_error"));
        assert_eq!(types(504), ("timeout_error", "timeout_error"));
    }
}
