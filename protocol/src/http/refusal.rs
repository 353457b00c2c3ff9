//! Why a message was refused: one variant per rule, each with its status, its counter name and its sentence.
//! One table below defines them all.

macro_rules! refusals {
    ($($name:ident $status:literal $reason:literal $message:literal)*) => {
        /// Why a message was refused. The connection closes after any of these: where the message ends is not known.
        ///
        /// The status is the answer to a client that sent it; when a backend sent it, the caller answers 502 instead.
        /// The parsers never find `LengthRequired`: it is for those who need a body.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Refusal {
            $(#[doc = $message] $name,)*
        }

        impl Refusal {
            /// Every refusal, for counters and for tests.
            pub const ALL: &'static [Refusal] = &[$(Refusal::$name,)*];

            /// The status code that answers a client.
            pub fn status(self) -> u16 {
                match self { $(Refusal::$name => $status,)* }
            }

            /// Stable name in snake_case, for counters and logs.
            pub fn reason(self) -> &'static str {
                match self { $(Refusal::$name => $reason,)* }
            }

            /// One sentence for a human: what was expected.
            pub fn message(self) -> &'static str {
                match self { $(Refusal::$name => $message,)* }
            }
        }
    };
}

refusals! {
    BadRequestLine 400 "bad_request_line" "The request line must be a method, one space, a target, one space, HTTP/1.1 and CRLF."
    MethodTooLong 501 "method_too_long" "The method is longer than any method known."
    ConnectUnsupported 501 "connect_unsupported" "CONNECT is not supported: this server does not tunnel."
    BadTarget 400 "bad_target" "The request target must be a path, or an http or https URI with one, in visible ASCII without a fragment or user."
    TargetTooLong 414 "target_too_long" "The request target is longer than this server accepts."
    UnsupportedVersion 505 "unsupported_version" "The protocol version must be HTTP/1.0 or HTTP/1.1."
    BadStatusLine 502 "bad_status_line" "The status line must be HTTP/1.1, one space, three digits, and optionally a space and a reason."
    EmptyLines 400 "empty_lines" "More empty lines precede the request line than a sender has reason to send."
    BareCr 400 "bare_cr" "A CR must be followed by LF."
    BareLf 400 "bare_lf" "A LF must be preceded by CR."
    LeadingWhitespace 400 "leading_whitespace" "The first header field must not begin with whitespace."
    ObsFold 400 "obs_fold" "A header field must not be continued on a second line."
    SpaceBeforeColon 400 "space_before_colon" "No whitespace may stand between a header field's name and its colon."
    BadHeaderName 400 "bad_header_name" "A header field's name must be an RFC 9110 token followed by a colon."
    BadHeaderValue 400 "bad_header_value" "A header field's value must not contain NUL or other control characters."
    HeadTooLarge 431 "head_too_large" "The message head has more bytes than this server accepts."
    TooManyHeaders 431 "too_many_headers" "The message head has more header fields than this server accepts."
    TooManyConnectionTokens 400 "too_many_connection_tokens" "The Connection field lists more options than a sender has reason to send."
    MissingHost 400 "missing_host" "An HTTP/1.1 request must have a Host field."
    RepeatedHost 400 "repeated_host" "A request must have no more than one Host field."
    BadHost 400 "bad_host" "The Host field must be a host name or address and optionally a port."
    ExpectationUnknown 417 "expectation_unknown" "The only expectation supported is 100-continue."
    ConflictingLengths 400 "conflicting_lengths" "A message must not have both Content-Length and Transfer-Encoding."
    RepeatedLength 400 "repeated_length" "A message must have no more than one Content-Length with one value."
    BadLength 400 "bad_length" "Content-Length must be decimal digits below 2 to the 64th."
    BadTransferCoding 400 "bad_transfer_coding" "Transfer-Encoding must not have empty list elements."
    UnknownTransferCoding 501 "unknown_transfer_coding" "The only transfer coding supported is chunked."
    ChunkedNotLast 400 "chunked_not_last" "The chunked transfer coding must be the last one."
    ChunkedTwice 400 "chunked_twice" "The chunked transfer coding must be applied only once."
    TransferCodingInHttp10 400 "transfer_coding_in_http10" "Transfer-Encoding does not exist in HTTP/1.0."
    NotFound 404 "not_found" "Nothing is served under this path."
    MethodNotAllowed 405 "method_not_allowed" "This path does not support the request's method."
    Misdirected 421 "misdirected" "The target names a scheme that this connection does not speak."
    PlainOnTls 400 "plain_on_tls" "This port speaks TLS: use https:// instead of http://."
    TlsOnPlain 400 "tls_on_plain" "This port speaks plain HTTP: use http:// instead of https://."
    BadDemoQuery 400 "bad_demo_query" "The demo model takes tokens_per_s and tokens from 1 to 100000 and first_token_ms from 0 to 600000."
    BadOnLeave 400 "bad_on_leave" "Tokenring-On-Leave must be cancel, detach, detach;ttl=SECONDS or finish, once."
    OnLeaveForbidden 403 "on_leave_forbidden" "Requests to this route may not choose what Tokenring-On-Leave asks for."
    LengthRequired 411 "length_required" "This request needs a body with Content-Length or chunked transfer coding."
    BodyTooLarge 413 "body_too_large" "The message body has more bytes than this server accepts."
    BadChunkSize 400 "bad_chunk_size" "A chunk size must be hexadecimal digits without sign, prefix or whitespace."
    ChunkSizeOverflow 400 "chunk_size_overflow" "A chunk size must have no more than 16 digits."
    BadChunkExtension 400 "bad_chunk_extension" "A chunk extension must not contain control characters."
    ChunkLineTooLong 400 "chunk_line_too_long" "A chunk-size line is longer than this server accepts."
    ChunkExcess 400 "chunk_excess" "The body has far more chunk extensions than payload."
    BadChunkEnd 400 "bad_chunk_end" "A chunk's payload must be followed by CRLF."
    TrailersTooLarge 431 "trailers_too_large" "The trailer section has more bytes than this server accepts."
    BadTrailer 400 "bad_trailer" "A trailer field must be a name, a colon and a value without control characters."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_the_names_in_snake_case_and_statuses_are_errors() {
        for refusal in Refusal::ALL {
            let mut snake = String::new();
            for letter in format!("{refusal:?}").chars() {
                if letter.is_uppercase() && !snake.is_empty() {
                    snake.push('_');
                }
                snake.push(letter.to_ascii_lowercase());
            }
            assert_eq!(refusal.reason(), snake);
            assert!((400..600).contains(&refusal.status()), "{refusal:?}");
            assert!(refusal.message().ends_with('.'), "{refusal:?}");
        }
    }
}
