//! A naive reader of HTTP/1.1 messages and event streams, on purpose not the one under test: it believes its peer, and
//! whatever it cannot read is an error of the shard.

/// How the reader finds the end of a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Frame {
    Empty,
    Length,
    Chunked,
    Close,
}

#[derive(Debug)]
enum Chunk {
    Size,
    Data,
    DataEnd,
    Trailer,
}

/// One message: its head, and its body as far as it has come.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) start_line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) frame: Frame,
    pub(crate) body: Vec<u8>,
    /// The framing says that the body is whole.
    pub(crate) complete: bool,
    left: u64,
    chunk: Chunk,
    line: Vec<u8>,
}

impl Message {
    fn parse(head: &[u8], is_response: bool, bodiless: bool) -> Result<Self, String> {
        let text = std::str::from_utf8(head).map_err(|_| "a head that is not text".to_owned())?;
        let mut lines = text.split("\r\n");
        let start_line = lines.next().unwrap_or_default().to_owned();
        let mut headers = Vec::new();
        for line in lines.filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").ok_or(format!("no field: {line:?}"))?;
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut message = Message {
            start_line,
            headers,
            frame: Frame::Empty,
            body: Vec::new(),
            complete: false,
            left: 0,
            chunk: Chunk::Size,
            line: Vec::new(),
        };
        if bodiless || (is_response && matches!(message.status(), 204 | 304)) {
            message.complete = true;
        } else if message.header("transfer-encoding") == Some("chunked") {
            message.frame = Frame::Chunked;
        } else if let Some(length) = message.header("content-length") {
            message.left = length.parse().map_err(|_| format!("length {length:?}"))?;
            message.frame = Frame::Length;
            message.complete = message.left == 0;
        } else if is_response {
            message.frame = Frame::Close;
        } else {
            message.complete = true;
        }
        Ok(message)
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn status(&self) -> u16 {
        self.start_line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// Takes body bytes; returns how many.
    fn feed(&mut self, input: &[u8]) -> Result<usize, String> {
        let mut at = 0;
        while at < input.len() && !self.complete {
            let rest = &input[at..];
            match (self.frame, &self.chunk) {
                (Frame::Empty, _) => break,
                (Frame::Close, _) => {
                    self.body.extend_from_slice(rest);
                    at = input.len();
                }
                (Frame::Length, _) | (Frame::Chunked, Chunk::Data) => {
                    let take = rest.len().min(self.left as usize);
                    self.body.extend_from_slice(&rest[..take]);
                    self.left -= take as u64;
                    at += take;
                    if self.left == 0 {
                        self.complete = self.frame == Frame::Length;
                        self.chunk = Chunk::DataEnd;
                    }
                }
                (Frame::Chunked, _) => {
                    at += 1;
                    self.line.push(rest[0]);
                    if self.line.ends_with(b"\r\n") {
                        let line = std::mem::take(&mut self.line);
                        self.chunk_line(&line[..line.len() - 2])?;
                    }
                }
            }
        }
        Ok(at)
    }

    fn chunk_line(&mut self, line: &[u8]) -> Result<(), String> {
        match self.chunk {
            Chunk::Size => {
                let text =
                    std::str::from_utf8(line).map_err(|_| "a chunk size that is not text".to_owned())?;
                self.left = u64::from_str_radix(text, 16).map_err(|_| format!("chunk size {text:?}"))?;
                self.chunk = if self.left == 0 { Chunk::Trailer } else { Chunk::Data };
            }
            Chunk::DataEnd if line.is_empty() => self.chunk = Chunk::Size,
            Chunk::Trailer if line.is_empty() => self.complete = true,
            _ => return Err(format!("{line:?} where a chunk ends")),
        }
        Ok(())
    }
}

/// Reads messages out of a byte stream.
#[derive(Debug)]
pub(crate) struct Reader {
    buffer: Vec<u8>,
    is_response: bool,
    /// For each answer awaited, in order: its request was HEAD.
    pub(crate) head_only: Vec<bool>,
    /// The last one may be incomplete.
    pub(crate) messages: Vec<Message>,
    pub(crate) interim: u32,
    /// Nothing sensible could be read.
    pub(crate) error: Option<String>,
}

impl Reader {
    pub(crate) fn new(is_response: bool) -> Self {
        Reader {
            buffer: Vec::new(),
            is_response,
            head_only: Vec::new(),
            messages: Vec::new(),
            interim: 0,
            error: None,
        }
    }

    pub(crate) fn complete(&self) -> usize {
        self.messages.iter().filter(|message| message.complete).count()
    }

    pub(crate) fn feed(&mut self, mut input: &[u8]) {
        while !input.is_empty() && self.error.is_none() {
            if let Some(message) = self.messages.last_mut().filter(|message| !message.complete) {
                match message.feed(input) {
                    Ok(taken) => input = &input[taken..],
                    Err(error) => self.error = Some(error),
                }
                continue;
            }
            self.buffer.push(input[0]);
            input = &input[1..];
            if self.buffer.ends_with(b"\r\n\r\n") {
                let head = std::mem::take(&mut self.buffer);
                let bodiless = self.head_only.get(self.messages.len()).copied().unwrap_or(false);
                match Message::parse(&head, self.is_response, bodiless) {
                    Ok(message) if self.is_response && message.status() < 200 => self.interim += 1,
                    Ok(message) => self.messages.push(message),
                    Err(error) => self.error = Some(error),
                }
            }
        }
    }

    /// The peer's FIN: bodies without a length are whole now.
    pub(crate) fn fin(&mut self) {
        if let Some(message) = self.messages.last_mut()
            && message.frame == Frame::Close
        {
            message.complete = true;
        }
    }
}

/// One event as a client's program sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Event {
    pub(crate) id: Option<u64>,
    pub(crate) name: String,
    pub(crate) data: String,
}

/// What an event stream's body says.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) events: Vec<Event>,
    pub(crate) comments: u32,
    /// Bytes behind the last blank line that are not only comments.
    pub(crate) partial: bool,
}

/// Reads events as WHATWG says, from a body that is here as far as it is.
pub(crate) fn read_events(body: &[u8]) -> Result<Events, String> {
    let text = std::str::from_utf8(body).map_err(|_| "an event stream that is not UTF-8".to_owned())?;
    let mut read = Events::default();
    let (mut id, mut name, mut data): (Option<u64>, String, Option<String>) = (None, String::new(), None);
    let mut rest = text;
    while let Some(at) = rest.find(['\r', '\n']) {
        let line = &rest[..at];
        rest = if rest[at..].starts_with("\r\n") { &rest[at + 2..] } else { &rest[at + 1..] };
        if line.is_empty() {
            if let Some(data) = data.take() {
                read.events.push(Event { id, name: std::mem::take(&mut name), data });
            }
            (id, name) = (None, String::new());
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => read.comments += 1,
            "id" => id = Some(value.parse().map_err(|_| format!("id {value:?}"))?),
            "event" => name = value.to_owned(),
            "data" => match &mut data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => data = Some(value.to_owned()),
            },
            _ => {}
        }
    }
    read.partial = data.is_some() || id.is_some() || !rest.is_empty();
    Ok(read)
}
