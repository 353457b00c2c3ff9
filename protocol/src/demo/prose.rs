//! The demo model's prose: a small body of sentences about streaming, recombined by a seed and cut into word pieces.
//! Everything is a slice of static text, so a piece costs no allocation.

/// Sentences that open a paragraph.
const OPENERS: [&str; 19] = [
    "A stream is a promise made in instalments.",
    "Waiting feels shorter when something moves, and a model that answers word by word has understood this.",
    "The first token is worth more than all the others, because it ends the doubt that anyone is listening.",
    "A proxy for token streams spends most of its life doing nothing, very carefully.",
    "Think of the connection as a long corridor with a door at each end and a reader who walks slowly.",
    "Backpressure is the polite word for a simple idea: do not pour faster than the glass can be drunk.",
    "Two rings, shared between a program and its kernel, replace a great deal of knocking on doors.",
    "Most streams end well; the craft lies in the ones that do not.",
    "Nothing in a network is ever slow on purpose, and yet everything in it is slow sooner or later.",
    "A thread that never shares has no one to wait for.",
    "Tokens arrive unevenly, like rain on a roof, and the listener should hear the rain and not the gutter.",
    "Latency hides in queues, so the shortest way to a fast answer is a short queue.",
    "Every buffer is a small loan, and every loan needs a date on which it is paid back.",
    "There are two kinds of silence on a wire: the one that thinks and the one that has died.",
    "Reconnecting is easy; knowing what was missed is the hard part.",
    "The quietest machine in the room is often the one that serves the most people.",
    "Failure comes in more shapes than success, and each shape deserves a name.",
    "A clock that is read too often costs more than the time it tells.",
    "It takes about 200 ms for a pause to become a question in the mind of the person who waits.",
];

/// Sentences that carry a paragraph on.
const BODIES: [&str; 43] = [
    "Each event leaves as soon as the kernel will take it, and whatever gathers in the meantime follows in one send.",
    "The submission ring says what should happen; the completion ring says what did.",
    "Between the two lies a borrowed piece of memory, which must not be touched until the loan is returned.",
    "When the reader stops reading, the writer learns of it by the number that no longer grows.",
    "A heartbeat tells the client that the line is open, but it must never persuade the model's clock that work is being done.",
    "If the backend falls silent before the first word, another backend may try; after it, only an honest error will do.",
    "A cut stream that looks finished is worse than one that says where it was cut.",
    "So the log keeps every event with a number, and a returning reader simply names the last one it saw.",
    "One core, one listener, one set of counters: what is not shared need not be locked.",
    "A connection is a row in a table and a handful of states, not a task with a life of its own.",
    "The timer wheel turns only when somebody is due, which is why an idle server is truly idle.",
    "Limits are written down by name, next to the reason for which they were chosen.",
    "Under load the events travel together, and the cost of each falls to a fraction; at rest each travels alone.",
    "Nobody waits in order to batch, because the batch forms by itself while the previous send is under way.",
    "The slow reader keeps its place in the log as long as the window allows, and no other reader has to know.",
    "A deadline belongs to the one who is being waited for: the user, the model, or the network between them.",
    "Half a megabyte in a socket buffer is not progress, it is merely out of sight.",
    "The café at the corner works the same way → orders go in on paper slips, and cups come out when they are ready.",
    "When two things happen at once, they are taken out of the ring first and acted upon afterwards, in order.",
    "A retry is a second request made with hope; a budget keeps hope from becoming an attack.",
    "The id on the line costs eight bytes and saves a conversation.",
    "Restarting a server need not end a sentence, provided that the sentence was not kept in the server alone.",
    "What the client has received counts, and not what the server believes to have sent.",
    "A thousand streams of fifty tokens a second are fifty thousand small decisions, and each takes about a µs.",
    "Memory is bounded when every queue has a length, every length has a name, and every name has a test.",
    "The kernel copies the bytes once, and once is enough.",
    "Reading ahead is generous only as long as someone pays for the shelf.",
    "It is tempting to wait for a fuller packet, but the person at the other end has been waiting longer.",
    "An event is complete at its blank line, and not a byte earlier.",
    "Some clients hang up in the middle of a word, and then the model should be told to save its breath.",
    "Others only lose the signal in a tunnel, and would be glad to find the rest of the answer on the other side.",
    "Telling these two apart is a matter of policy, so it is asked once, in the settings, and not guessed per request.",
    "The fair queue gives each tenant a turn, however long the line behind the loudest of them has grown.",
    "A breaker opens because of what the backend did, and never because a client lost patience.",
    "Whoever holds a permit gives it back, whether by finishing, by failing, or simply by going away.",
    "Moving a connection to the core where its data lives is cheaper than carrying the data to the connection.",
    "Simulated networks fail on demand, which real ones do only when nobody is watching.",
    "A seed of sixty-four bits is enough to bring back the worst afternoon of the year, step by step.",
    "The histogram remembers the one slow turn in a million that an average would have forgiven.",
    "Bytes that are framed once can be sent to every subscriber from the same place in memory.",
    "Order matters more than speed: a late word can be read, but a word out of place changes the meaning.",
    "Measured over a day, the difference between polite and greedy buffering is several gigabytes.",
    "And when nothing can be saved, the last thing sent is a sentence that says so, naïve as that may sound.",
];

/// Sentences that close a paragraph.
const CLOSERS: [&str; 13] = [
    "That is all there is to it, and it is quite enough.",
    "The rest is bookkeeping, done without fail.",
    "Seen from the outside, it just looks as if the words were flowing.",
    "This is why the boring design won.",
    "In the end the reader notices nothing, which was the point.",
    "A good pipe is one that nobody has to think about.",
    "Slow is smooth, and smooth, as they say, is fast.",
    "What remains is a number in a log and a reader who is content.",
    "Everything else follows from keeping that one promise.",
    "It sounds simple because the difficult cases were thought through first.",
    "And so the next token finds the door already open.",
    "The ring turns, and the line moves on.",
    "Whatever happens next, it will at least be said aloud.",
];

/// Ends of words before which a long word is cut, longest first.
const WORD_ENDS: [&str; 16] = [
    "pressure", "ation", "tion", "ment", "ness", "able", "ible", "ing", "ers", "ies", "ure", "ent", "ive",
    "ed", "er", "ly",
];

/// A prime-sized list walked in strides, so that every seed gives an order of its own without repeats.
#[derive(Clone, Copy, Debug)]
struct Walk {
    at: usize,
    stride: usize,
}

impl Walk {
    fn new(random: u64, length: usize) -> Self {
        Walk {
            at: (random % length as u64) as usize,
            stride: 1 + ((random >> 32) % (length as u64 - 1)) as usize,
        }
    }

    fn next(&mut self, from: &[&'static str]) -> &'static str {
        self.at = (self.at + self.stride) % from.len();
        from[self.at]
    }
}

/// An endless text, one word piece after another; a copy continues from the same place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prose {
    openers: Walk,
    bodies: Walk,
    closers: Walk,
    random: u64,
    /// Sentences still to come in this paragraph, the closing one included.
    sentences_left: u64,
    /// Rest of the current sentence.
    rest: &'static str,
    begun: bool,
}

impl Prose {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = seed;
        let mut draw = || next_random(&mut random);
        Prose {
            openers: Walk::new(draw(), OPENERS.len()),
            bodies: Walk::new(draw(), BODIES.len()),
            closers: Walk::new(draw(), CLOSERS.len()),
            random,
            sentences_left: 0,
            rest: "",
            begun: false,
        }
    }

    /// The next piece, in two parts: the space or paragraph break that a sentence begins with, and the word piece.
    pub(super) fn next_piece(&mut self) -> (&'static str, &'static str) {
        let lead = if self.rest.is_empty() { self.begin_sentence() } else { "" };
        let (piece, rest) = self.rest.split_at(piece_bytes(self.rest));
        self.rest = rest;
        (lead, piece)
    }

    /// Whether the last piece ended a sentence.
    pub(super) fn is_at_sentence_end(&self) -> bool {
        self.rest.is_empty()
    }

    fn begin_sentence(&mut self) -> &'static str {
        let opens = self.sentences_left == 0;
        if opens {
            self.sentences_left = 4 + next_random(&mut self.random) % 3;
            self.rest = self.openers.next(&OPENERS);
        } else if self.sentences_left == 1 {
            self.rest = self.closers.next(&CLOSERS);
        } else {
            self.rest = self.bodies.next(&BODIES);
        }
        self.sentences_left -= 1;
        match (self.begun, opens) {
            (false, _) => {
                self.begun = true;
                ""
            }
            (true, true) => "\n\n",
            (true, false) => " ",
        }
    }
}

/// splitmix64 (Steele, Lea and Flood, 2014): advances `state` and returns a number that looks random.
pub(super) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// Bytes of the first piece of a text: an optional space, then a word (or the front of a long one) or one sign.
fn piece_bytes(text: &str) -> usize {
    let space = usize::from(text.starts_with(' '));
    let word = &text[space..];
    let mut characters = word.char_indices();
    let Some((_, first)) = characters.next() else { return space };
    let is_suffix = first == '\'' && word[1..].starts_with(char::is_alphabetic);
    if !first.is_alphanumeric() && !is_suffix {
        return space + first.len_utf8();
    }
    let word_bytes = characters.find(|(_, c)| !c.is_alphanumeric()).map_or(word.len(), |(at, _)| at);
    space + front_bytes(&word[..word_bytes])
}

/// Where a word is cut: before a usual ending, or in the middle; short words are whole.
fn front_bytes(word: &str) -> usize {
    if word.len() <= 7 {
        return word.len();
    }
    let before_end =
        WORD_ENDS.iter().filter_map(|end| word.strip_suffix(end)).map(str::len).find(|&front| front >= 4);
    match before_end {
        Some(front) => front,
        None if word.len() > 9 => {
            (word.len() / 2..word.len()).find(|&at| word.is_char_boundary(at)).unwrap_or(word.len())
        }
        None => word.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_prime_lengths_so_that_every_stride_visits_all() {
        for length in [OPENERS.len(), BODIES.len(), CLOSERS.len()] {
            assert!((2..length).all(|divisor| length % divisor != 0), "{length}");
        }
    }

    #[test]
    fn sentences_are_whole_and_said_once() {
        let all = || OPENERS.iter().chain(&BODIES).chain(&CLOSERS);
        for sentence in all() {
            assert!(sentence.ends_with('.') && !sentence.contains('\n'), "{sentence}");
            assert!(sentence.starts_with(char::is_uppercase), "{sentence}");
            assert_eq!(all().filter(|other| *other == sentence).count(), 1, "{sentence}");
        }
        assert!(all().count() >= 60);
    }

    #[test]
    fn pieces_put_together_are_the_text() {
        let mut prose = Prose::new(5);
        let (mut text, mut pieces) = (String::new(), 0);
        while pieces < 3000 {
            let (lead, piece) = prose.next_piece();
            assert!(!piece.is_empty() && piece.chars().count() <= 10, "{piece:?}");
            text.push_str(lead);
            text.push_str(piece);
            pieces += 1;
        }
        let opener = OPENERS.iter().find(|opener| text.starts_with(**opener)).expect("begins with an opener");
        assert!(text[opener.len()..].starts_with(' '));
        for paragraph in text.split("\n\n").take(5) {
            assert!(CLOSERS.iter().any(|closer| paragraph.ends_with(closer)), "{paragraph}");
        }
        let per_word = pieces as f64 / text.split_whitespace().count() as f64;
        assert!((1.1..1.7).contains(&per_word), "word pieces as models have them: {per_word}");
    }

    #[test]
    fn seeds_differ_and_repeat() {
        let text = |seed| {
            let mut prose = Prose::new(seed);
            (0..200).map(|_| prose.next_piece()).flat_map(|(lead, piece)| [lead, piece]).collect::<String>()
        };
        assert_eq!(text(1), text(1));
        assert!((2..50).all(|seed| text(seed) != text(1)));
    }
}
