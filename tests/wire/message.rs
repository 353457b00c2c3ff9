//! HTTP messages as these tests write and read them. Strict, small, and independent of the server's own parsers.

/// A message that was read: its first line, its fields, its body as far as it came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Message {
    pub(crate) first_line: String,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
}

/// How a body ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Framing {
    None,
    Length(usize),
    Chunked,
    UntilClose,
}

impl Message {
    pub(crate) fn parse(head: &[u8]) -> Message {
        let text = std::str::from_utf8(head).expect("heads are ASCII here");
        let mut lines = text.strip_suffix("\r\n\r\n").expect("a whole head").split("\r\n");
        let first_line = lines.next().unwrap().to_owned();
        Message { first_line, fields: lines.map(field).collect(), ..Message::default() }
    }

    pub(crate) fn status(&self) -> u16 {
        let rest = self.first_line.strip_prefix("HTTP/1.1 ").expect("a status line of HTTP/1.1");
        rest[..3].parse().unwrap()
    }

    /// All values of a field, joined as a list.
    pub(crate) fn field(&self, name: &str) -> Option<String> {
        let values: Vec<&str> = self
            .fields
            .iter()
            .filter(|(field, _)| field.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect();
        (!values.is_empty()).then(|| values.join(", "))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?} in {self:?}"))
    }

    /// `error.code` of either shape of error body.
    pub(crate) fn error_code(&self) -> String {
        assert_eq!(self.field("content-type").as_deref(), Some("application/json"));
        self.json()["error"]["code"].as_str().expect("error.code").to_owned()
    }

    /// Of a request; a response to `method` otherwise.
    pub(crate) fn framing(&self, answers: Option<&str>) -> Framing {
        let coding = self.field("transfer-encoding");
        let length = self.field("content-length");
        assert!(coding.is_none() || length.is_none(), "two framings: {self:?}");
        if let Some(method) = answers {
            let status = self.status();
            if method == "HEAD" || status < 200 || status == 204 || status == 304 {
                return Framing::None;
            }
        }
        match (coding.as_deref(), length) {
            (Some("chunked"), _) => Framing::Chunked,
            (Some(other), _) => panic!("transfer coding {other}"),
            (None, Some(length)) => Framing::Length(length.parse().expect("one length")),
            (None, None) if answers.is_some() => Framing::UntilClose,
            (None, None) => Framing::None,
        }
    }
}

pub(crate) fn field(line: &str) -> (String, String) {
    let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("a field: {line:?}"));
    (name.to_owned(), value.trim().to_owned())
}

pub(crate) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: a.test\r\n\r\n").into_bytes()
}

pub(crate) fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: a.test\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// A backend's ordinary answer with a length.
pub(crate) fn ok(body: &str) -> Vec<u8> {
    answer("200 OK", "Content-Type: text/plain\r\n", body)
}

pub(crate) fn answer(status: &str, fields: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

pub(crate) fn chunk(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}
