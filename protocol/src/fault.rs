//! What went wrong, as told to a client.
#![allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Culprit { Client, Upstream, Gateway, Operator }
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault { pub status: u16, pub code: &'static str, pub message: &'static str, pub culprit: Culprit, pub retry_helps: bool }
