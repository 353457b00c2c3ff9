//! `tokenring streams`: the streams of a server that runs, or those that a data directory holds.

mod directory;
mod http;
mod server;
mod tail;

use crate::exit::{Exit, Fatal};
pub(crate) use http::Client;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

/// What is asked of whom.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) of: Of,
    pub(crate) what: What,
}

#[derive(Clone, Debug)]
pub(crate) enum Of {
    Directory(PathBuf),
    Server(Client),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum What {
    List {
        json: bool,
    },
    /// One stream, by its id or path.
    Show {
        which: String,
        json: bool,
    },
    Tail(Tail),
    /// What a read of it from its start would give.
    Export(String),
    Verify,
}

/// How a stream's end is followed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Tail {
    pub(crate) which: String,
    /// Behind which event or offset; none: from the oldest that is held.
    pub(crate) after: Option<String>,
    /// The data of events alone, a line or more for each.
    pub(crate) data: bool,
    /// So many of the last messages of a directory's stream.
    pub(crate) last: usize,
    pub(crate) follow: bool,
}

/// Why there is no more to print.
enum Stopped {
    Fatal(Fatal),
    /// Who reads what is printed has gone.
    Unread,
}

impl From<Fatal> for Stopped {
    fn from(fatal: Fatal) -> Self {
        Stopped::Fatal(fatal)
    }
}

impl Stopped {
    fn writing(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Stopped::Unread,
            _ => Stopped::Fatal(Fatal::internal(format!("cannot write to stdout: {error}"))),
        }
    }
}

/// Where answers go. What was put is out at once.
struct Out<'a>(&'a mut dyn Write);

impl Out<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Stopped> {
        self.0.write_all(bytes).and_then(|()| self.0.flush()).map_err(|error| Stopped::writing(&error))
    }
}

/// Prints the answer, as it comes.
pub(crate) fn answer(question: &Question, out: &mut dyn Write) -> Result<Exit, Fatal> {
    let mut out = Out(out);
    let answered = match &question.of {
        Of::Directory(directory) => directory::answer(directory, &question.what, &mut out),
        Of::Server(client) => server::answer(client, &question.what, &mut out),
    };
    match answered {
        Ok(exit) => Ok(exit),
        Err(Stopped::Unread) => Ok(Exit::Success),
        Err(Stopped::Fatal(fatal)) => Err(fatal),
    }
}

/// Columns, as wide as what is in them.
fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let space = " ".repeat(widths[column] - cell.chars().count());
            line += if column > 0 { "  " } else { "" };
            line += &if right.contains(&column) { space + cell } else { format!("{cell}{space}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [["NAME", "BYTES"], ["a", "7"], ["längere", "1000000"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.map(str::to_owned).to_vec()).collect();
        assert_eq!(table(&rows, &[1]), "NAME       BYTES\na              7\nlängere  1000000\n");
    }
}
