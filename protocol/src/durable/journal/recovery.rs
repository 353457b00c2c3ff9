//! Reading a journal: twice through all segments in their order, first to see what there is, then to take it.
//!
//! ```text
//!   scan, scan, … ─► what is missing, and whether it was acknowledged ─► apply, apply, … ─► finish
//! ```

use super::super::Form;
use super::image::{Image, StreamFacts};
use super::record::{
    self, Deed, Head, KEPT, Kind, Messages, Payload, RECORD_HEADER_BYTES, RELAYED, SEGMENT_HEADER_BYTES,
};
use super::record::{SegmentHead, find_head};
use super::relayed_name;
use std::collections::{HashMap, HashSet};

/// Something that is not as it was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Of the segment.
    pub segment: u64,
    /// Offset in its file, bytes.
    pub at: u64,
    /// What it is, and what it costs.
    pub what: String,
    /// Something acknowledged was lost. Otherwise it was still being written, and nobody had been promised anything.
    pub lost: bool,
}

/// What a journal holds.
#[derive(Debug, Default)]
pub struct Recovered {
    pub(in super::super) images: Vec<Image>,
    /// In the order of the files.
    pub findings: Vec<Finding>,
    /// The greatest of all streams that ever were.
    pub(in super::super) created: u64,
    /// The last record that counts.
    pub(in super::super) last: u64,
    /// Of the last record that counts and has a number.
    pub(in super::super) last_deed: Deed,
    /// The segments there are, and their bytes.
    pub(in super::super) segments: Vec<(u64, u64)>,
    /// Records that count.
    pub records: u64,
}

impl Recovered {
    /// The streams, in the order of their creation.
    pub fn streams(&self) -> impl Iterator<Item = StreamFacts<'_>> {
        self.images.iter().filter(|image| image.relay.is_none()).map(StreamFacts)
    }

    /// What a read of a stream from its start gives; of a fork, what its source still holds included.
    pub fn content(&self, path: &str) -> Option<Vec<u8>> {
        let mut image = self.images.iter().find(|image| *image.facts.path == *path && !image.deleted)?;
        let json = Form::of(&image.facts.content_type) == Form::Json;
        let mut end = image.tail;
        let mut pieces = Vec::new();
        loop {
            let messages: Vec<_> = image.messages().collect();
            for (behind, message) in messages.into_iter().rev() {
                let at = behind - message.len() as u64;
                if at < end {
                    let length = usize::try_from(end.min(behind) - at).unwrap_or(0);
                    pieces.push(&message[..length]);
                    end = at;
                }
            }
            let source = self.images.iter().find(|source| source.created == image.facts.source);
            match source {
                Some(source) if end <= image.facts.base && source.tail >= image.facts.base => {
                    end = end.min(image.facts.base);
                    image = source;
                }
                _ => break,
            }
        }
        pieces.reverse();
        let mut content = pieces.concat();
        if json {
            content.pop();
            content.insert(0, b'[');
            content.push(b']');
        }
        Some(content)
    }

    /// Bytes in segment files.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Segment files.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }
}

impl Default for Deed {
    fn default() -> Self {
        Deed::NONE
    }
}

/// Numbers of records that are not there.
#[derive(Clone, Copy, Debug)]
struct Loss {
    first: u64,
    last: u64,
    /// What the last of them was.
    known: Option<Deed>,
    segment: u64,
    at: u64,
    /// Of those before the last it is known that they were not their streams' last.
    resolved: bool,
}

/// A segment that was scanned, and can be read.
#[derive(Clone, Copy, Debug)]
struct Scanned {
    number: u64,
    head: SegmentHead,
}

/// Reads a journal.
#[derive(Debug, Default)]
pub struct Recovery {
    segments: Vec<Scanned>,
    files: Vec<(u64, u64)>,
    last: u64,
    last_deed: Deed,
    synced: u64,
    losses: Vec<Loss>,
    /// The unreadable end of the last segment.
    torn: Option<(u64, u64, u64)>,
    findings: Vec<Finding>,
    /// The first record that does not count; known after the first pass.
    cut: Option<u64>,
    images: HashMap<u64, Image>,
    orphans: HashSet<u64>,
    created: u64,
    records: u64,
}

/// What lies at a place in a segment.
enum Item<'a> {
    Record(Head, &'a [u8]),
    /// A record whose payload is not what was written, or not all there.
    Damaged(Head),
    /// No record can be seen here, up to the next that can.
    Unreadable(usize),
}

/// Everything in a segment, in its order. A record is taken for one only where its number can be right.
fn walk<'a>(bytes: &'a [u8], segment: SegmentHead, mut on: impl FnMut(usize, Item<'a>)) {
    let (mut at, mut last) = (SEGMENT_HEADER_BYTES, segment.follows);
    while at < bytes.len() {
        let plausible = |from: usize, skipped: usize| {
            let head = Head::read(&bytes[from..], segment.salt)?;
            let lost = head.number.checked_sub(last)?.checked_sub(u64::from(head.deed.kind.counts()))?;
            (lost <= (skipped / RECORD_HEADER_BYTES) as u64).then_some(head)
        };
        let Some(head) = plausible(at, 0) else {
            let mut next = at;
            let found = loop {
                match find_head(bytes, next + 1) {
                    Some(place) if plausible(place, place - at).is_some() => break Some(place),
                    Some(place) => next = place,
                    None => break None,
                }
            };
            let end = found.unwrap_or(bytes.len());
            on(at, Item::Unreadable(end - at));
            if let Some(head) = found.and_then(|place| plausible(place, place - at)) {
                last = head.number - u64::from(head.deed.kind.counts());
            }
            at = end;
            continue;
        };
        last = head.number;
        let end = at + head.record_bytes();
        match bytes.get(at + RECORD_HEADER_BYTES..end) {
            Some(payload) if head.vouches_for(payload, segment.salt) => on(at, Item::Record(head, payload)),
            _ => on(at, Item::Damaged(head)),
        }
        at = end;
    }
}

impl Recovery {
    /// Nothing read yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// First pass: the content of a segment's file. Those with smaller numbers come first.
    pub fn scan(&mut self, number: u64, bytes: &[u8]) {
        self.files.push((number, bytes.len() as u64));
        let before = self.files.len().checked_sub(2).map_or((number, 0), |last| self.files[last]);
        let Some(head) = SegmentHead::read(bytes).filter(|head| head.number == number) else {
            // One that was only just made.
            if !bytes.is_empty() {
                // Whether anything in it counted, the next segment says.
                let what = "its head is damaged, or was never written: nothing in it can be read".to_owned();
                self.findings.push(Finding { segment: number, at: 0, what, lost: false });
            }
            return;
        };
        if self.segments.is_empty() {
            self.last = head.follows;
        }
        if head.follows < self.last {
            // What was written behind that never counted.
            self.losses.retain(|loss| loss.first <= head.follows);
            for loss in self.losses.iter_mut().filter(|loss| loss.last > head.follows) {
                (loss.last, loss.known) = (head.follows, None);
            }
            self.last = head.follows;
        }
        self.torn = None;
        self.segments.push(Scanned { number, head });
        let mut place = if self.last < head.follows { before } else { (number, 0) };
        walk(bytes, head, |at, item| {
            let at = at as u64;
            let (head, damaged) = match item {
                Item::Unreadable(skipped) => {
                    place = (number, at);
                    self.torn = Some((number, at, skipped as u64));
                    return;
                }
                Item::Record(head, _) => (head, false),
                Item::Damaged(head) => (head, true),
            };
            self.torn = None;
            self.synced = self.synced.max(head.synced);
            let counts = u64::from(head.deed.kind.counts());
            if head.number > self.last + counts {
                let (first, last) = (self.last + 1, head.number - counts);
                let (segment, at, known) = (place.0, place.1, Some(head.before));
                self.losses.push(Loss { first, last, known, segment, at, resolved: false });
            }
            if damaged && counts > 0 {
                let (first, last, known) = (head.number, head.number, Some(head.deed));
                self.losses.push(Loss { first, last, known, segment: number, at, resolved: false });
            }
            self.last = self.last.max(head.number);
            if counts > 0 {
                self.last_deed = head.deed;
            }
        });
        if self.last < head.follows {
            // Nothing is in it yet, and what it follows is not there.
            let (first, last) = (self.last + 1, head.follows);
            let (segment, at) = before;
            self.losses.push(Loss { first, last, known: None, segment, at, resolved: false });
            self.last = head.follows;
        }
    }

    /// After the first pass: where the journal ends, and what of it is lost.
    fn settle(&mut self) -> u64 {
        if let Some(cut) = self.cut {
            return cut;
        }
        let synced = self.synced;
        let unsynced = self.losses.iter().filter(|loss| loss.last > synced);
        let cut = unsynced.map(|loss| loss.first.max(synced + 1)).min().unwrap_or(self.last + 1);
        if cut <= self.last {
            let loss = self.losses.iter().filter(|loss| loss.last > synced).min_by_key(|loss| loss.first);
            let (segment, at) = loss.map_or((0, 0), |loss| (loss.segment, loss.at));
            let records = self.last + 1 - cut;
            let what =
                format!("the end was being written: {records} records that nobody was promised are cut");
            self.findings.push(Finding { segment, at, what, lost: false });
            self.last = cut - 1;
        } else if let Some((segment, at, bytes)) = self.torn {
            let what = format!("the end was being written: {bytes} bytes that nobody was promised are cut");
            self.findings.push(Finding { segment, at, what, lost: false });
        }
        self.losses.retain(|loss| loss.first < cut);
        for loss in self.losses.iter_mut().filter(|loss| loss.last >= cut) {
            (loss.last, loss.known) = (cut - 1, None);
        }
        self.cut = Some(cut);
        cut
    }

    /// Second pass, after the first of all segments: the same contents in the same order.
    pub fn apply(&mut self, number: u64, bytes: &[u8]) {
        let cut = self.settle();
        let Some(index) = self.segments.iter().position(|segment| segment.number == number) else { return };
        let head = self.segments[index].head;
        let void =
            self.segments[index + 1..].iter().map(|later| later.head.follows).min().unwrap_or(u64::MAX);
        walk(bytes, head, |at, item| {
            let Item::Record(head, payload) = item else { return };
            if head.number < cut && head.number <= void && !self.take(number, head, payload) {
                let what = format!("a record ({}) cannot be understood", head.deed.kind.name());
                self.findings.push(Finding { segment: number, at: at as u64, what, lost: true });
            }
        });
    }

    /// Takes a record; false when it makes no sense.
    fn take(&mut self, segment: u64, head: Head, payload: &[u8]) -> bool {
        let (deed, mut payload) = (head.deed, Payload(payload));
        self.records += 1;
        if deed.kind.counts() {
            self.last_deed = deed;
        }
        if deed.flags & RELAYED != 0 {
            return self.take_relayed(segment, head, payload);
        }
        self.created = self.created.max(deed.stream);
        let known = self.images.get_mut(&deed.stream);
        match (deed.kind, known) {
            (Kind::Mark, _) => return true,
            (Kind::Seal, _) => return self.take_seal(segment, head.number, &mut payload),
            (Kind::Create, _) => {
                let Some(facts) = payload.facts() else { return false };
                let Some(messages) = payload.messages() else { return false };
                let image = Image::new(deed, head.number, facts, messages, segment);
                self.images.insert(deed.stream, image);
            }
            (Kind::Snapshot, None) => {
                let Some(facts) = payload.facts() else { return false };
                let mut image = Image::new(deed, head.number, facts.clone(), Messages::default(), segment);
                image.deleted = deed.flags & KEPT != 0;
                image.begin_snapshot(deed, facts, segment);
                self.images.insert(deed.stream, image);
                self.orphans.remove(&deed.stream);
            }
            (Kind::Delete, known) => {
                self.orphans.remove(&deed.stream);
                if deed.flags & KEPT == 0 {
                    self.images.remove(&deed.stream);
                } else if let Some(image) = known {
                    image.deleted = true;
                }
            }
            (_, None) => _ = self.orphans.insert(deed.stream),
            (Kind::Snapshot, Some(image)) => {
                let Some(facts) = payload.facts() else { return false };
                image.begin_snapshot(deed, facts, segment);
            }
            (Kind::Append, Some(image)) => {
                let Some(appended) = payload.appended() else { return false };
                image.append(deed, appended);
            }
            (Kind::Trim, Some(image)) => {
                let Some((earliest, marks)) = payload.trimmed() else { return false };
                image.trim(earliest);
                image.marks = marks;
            }
            (Kind::Data, Some(image)) => {
                let Some(messages) = payload.messages() else { return false };
                image.refresh(messages);
            }
            (Kind::Whole, Some(image)) => image.end_snapshot(),
        }
        if let Some(image) = self.images.get_mut(&deed.stream) {
            image.last_number = head.number;
            // Whatever it tells, it names the end: a stream whose end is not held is known by that.
            image.tail = image.tail.max(deed.end);
            image.closed |= deed.flags & record::CLOSED != 0;
        }
        true
    }

    /// The same of a stream that was relayed from a model.
    fn take_relayed(&mut self, segment: u64, head: Head, mut payload: Payload<'_>) -> bool {
        let deed = head.deed;
        let begins = matches!(deed.kind, Kind::Create | Kind::Snapshot);
        if begins && !self.images.contains_key(&deed.stream) {
            let Some(facts) = Payload(payload.0).relay_facts() else { return false };
            let path = relayed_name(deed.stream);
            let image = Image::relayed(deed, head.number, facts, path, segment);
            self.images.insert(deed.stream, image);
            self.orphans.remove(&deed.stream);
        }
        if deed.kind == Kind::Delete {
            self.images.remove(&deed.stream);
            self.orphans.remove(&deed.stream);
            return true;
        }
        let Some(image) = self.images.get_mut(&deed.stream) else {
            self.orphans.insert(deed.stream);
            return true;
        };
        match deed.kind {
            Kind::Whole => image.end_snapshot(),
            kind => {
                if begins && payload.relay_facts().is_none() {
                    return false;
                }
                let Some((told, messages)) = payload.relay_told() else { return false };
                match kind {
                    Kind::Snapshot => image.begin_relay_snapshot(deed, told, segment),
                    Kind::Data => image.refresh_relay(&told, messages),
                    _ => image.append_relayed(deed, told, messages),
                }
            }
        }
        image.last_number = head.number;
        true
    }

    /// A seal tells which streams' last records are among those lost.
    fn take_seal(&mut self, segment: u64, number: u64, payload: &mut Payload<'_>) -> bool {
        let Some(entries) = payload.seal() else { return false };
        let mut found = Vec::new();
        let covered = |loss: &&mut Loss| loss.segment == segment && loss.last <= number && !loss.resolved;
        for loss in self.losses.iter_mut().filter(covered) {
            loss.resolved = true;
            let of = |(number, _): &&record::Sealed| (loss.first..loss.last).contains(number);
            found.extend(entries.iter().filter(of).map(|&(number, deed)| Loss {
                first: number,
                last: number,
                known: Some(deed),
                ..*loss
            }));
        }
        self.losses.extend(found);
        true
    }

    /// What the journal holds.
    pub fn finish(mut self) -> Recovered {
        self.settle();
        for image in self.images.values_mut() {
            image.settle_snapshot();
        }
        let losses = std::mem::take(&mut self.losses);
        for loss in &losses {
            self.account(loss);
        }
        for image in self.images.values_mut() {
            if image.mend() {
                let what = format!(
                    "{} has lost messages: it begins at position {} now",
                    image.facts.path, image.facts.earliest
                );
                let at = losses.first().map_or((image.segment, 0), |loss| (loss.segment, loss.at));
                let lost = !image.is_holed() || !losses.is_empty();
                self.findings.push(Finding { segment: at.0, at: at.1, what, lost });
            }
        }
        let unknown =
            losses.iter().filter(|loss| !loss.resolved && (loss.first < loss.last || loss.known.is_none()));
        if let Some(first) = unknown.map(|loss| loss.first).min() {
            self.doubt(first);
        }
        // A segment goes only when no stream needs it: what has no beginning has lost it.
        if !self.orphans.is_empty() {
            let what = format!("{} streams whose creation cannot be read are lost", self.orphans.len());
            let at = losses.first().map_or((0, 0), |loss| (loss.segment, loss.at));
            self.findings.push(Finding { segment: at.0, at: at.1, what, lost: true });
        }
        if let Some(deed) = losses.iter().filter(|loss| loss.last == self.last).find_map(|loss| loss.known) {
            self.last_deed = deed;
        }
        self.drop_unsound();
        self.drop_unneeded();
        let mut images: Vec<Image> = self.images.into_values().collect();
        images.sort_by_key(|image| image.created);
        self.findings.sort_by_key(|finding| (finding.segment, finding.at));
        Recovered {
            images,
            findings: self.findings,
            created: self.created,
            last: self.last,
            last_deed: self.last_deed,
            segments: self.files,
            records: self.records,
        }
    }

    /// What a loss costs the stream of which it is known.
    fn account(&mut self, loss: &Loss) {
        let count = loss.last - loss.first + 1;
        let mut what = match count {
            1 => "a record is damaged".to_owned(),
            count => format!("{count} records are damaged"),
        };
        if let Some(deed) = loss.known.filter(|deed| deed.stream != 0) {
            if deed.flags & RELAYED == 0 {
                self.created = self.created.max(deed.stream);
            }
            let image = self.images.get_mut(&deed.stream);
            let path = image.as_ref().map_or_else(
                || match deed.flags & RELAYED {
                    0 => format!("a stream that is not there (created {})", deed.stream),
                    _ => format!("{}, which is not there", relayed_name(deed.stream)),
                },
                |image| image.facts.path.to_string(),
            );
            what = format!(
                "{what}: {}{} of {path}",
                if count > 1 { "the last is the " } else { "" },
                deed.kind.name()
            );
            match (deed.kind, image) {
                (Kind::Append | Kind::Create, Some(image)) => {
                    image.tail = image.tail.max(deed.end);
                    image.closed |= deed.flags & record::CLOSED != 0;
                }
                (Kind::Delete, Some(image)) if deed.flags & KEPT != 0 => image.deleted = true,
                (Kind::Delete, _) => _ = self.images.remove(&deed.stream),
                _ => {}
            }
        }
        self.findings.push(Finding { segment: loss.segment, at: loss.at, what, lost: true });
    }

    /// Records are lost of which nothing is known: any stream without a later one may have lost its end. So that no offset
    /// comes to mean something else, those streams get new ones: who comes with an old one is told that it is gone.
    fn doubt(&mut self, first: u64) {
        let mut renewed = HashMap::new();
        let (relayed, mut all): (Vec<&mut Image>, Vec<&mut Image>) =
            self.images.values_mut().partition(|image| image.relay.is_some());
        for image in relayed.into_iter().filter(|image| image.last_number < first) {
            // No event of it will be given an id any more: there is nothing that could be mistaken.
            image.damaged = true;
            let what = format!("{} may have lost its last events", image.facts.path);
            self.findings.push(Finding { segment: image.segment, at: 0, what, lost: true });
        }
        let doubted: HashSet<u64> = all
            .iter()
            .filter(|image| image.last_number < first)
            .map(|image| image.facts.generation)
            .collect();
        all.sort_by_key(|image| image.created);
        for image in all {
            if !doubted.contains(&image.facts.generation) {
                continue;
            }
            let generation = *renewed.entry(image.facts.generation).or_insert_with(|| {
                self.created += 1;
                self.created
            });
            image.facts.generation = generation;
            image.damaged = true;
            let what = format!("{} may have lost its last messages: its offsets are new", image.facts.path);
            self.findings.push(Finding { segment: image.segment, at: 0, what, lost: true });
        }
    }

    fn drop_unsound(&mut self) {
        let Recovery { images, findings, .. } = self;
        images.retain(|_, image| {
            let sound = image.is_sound();
            if !sound {
                let what = format!("{} is lost: its records contradict each other", image.facts.path);
                findings.push(Finding { segment: image.segment, at: 0, what, lost: true });
            }
            sound
        });
    }

    /// Streams that were deleted and have no fork any more.
    fn drop_unneeded(&mut self) {
        loop {
            let needed: HashSet<u64> = self.images.values().map(|image| image.facts.source).collect();
            let before = self.images.len();
            self.images.retain(|created, image| !image.deleted || needed.contains(created));
            if self.images.len() == before {
                break;
            }
        }
    }
}
