//! The `Io` of a simulated machine: a handle on its [`World`].

use crate::world::{Done, World};
use protocol::log::Lent;
use protocol::slots::Key;
use shard::io::{Close, Confirm, Errno, Half, Io, OpId, Wait};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SimSocket(pub(crate) u32);

/// Received bytes; its buffer is free again when it is dropped.
pub(crate) struct SimBuffer {
    bytes: Vec<u8>,
    used: Rc<Cell<usize>>,
}

impl SimBuffer {
    pub(crate) fn new(bytes: Vec<u8>, used: &Rc<Cell<usize>>) -> Self {
        assert!(!bytes.is_empty(), "an empty receive is not a receive");
        used.set(used.get() + 1);
        SimBuffer { bytes, used: Rc::clone(used) }
    }
}

impl Drop for SimBuffer {
    fn drop(&mut self) {
        self.used.set(self.used.get() - 1);
    }
}

impl Deref for SimBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for SimBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl std::fmt::Debug for SimBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = &self.bytes[..self.bytes.len().min(100)];
        write!(f, "{} bytes \"{}\"", self.bytes.len(), shown.escape_ascii())
    }
}

/// And which of its rings.
#[derive(Clone)]
pub(crate) struct SimIo(pub(crate) Rc<RefCell<World>>, pub(crate) usize);

impl SimIo {
    /// A listener of this shard, among those of all.
    fn listener(&self, listener: usize) -> usize {
        self.1 * self.listeners() + listener
    }
}

impl Io for SimIo {
    type Socket = SimSocket;
    type Parcel = SimSocket;
    type Buffer = SimBuffer;

    fn now_us(&self) -> u64 {
        self.0.borrow().now
    }

    fn turn(&mut self, wait: Wait, completions: &mut Vec<Done>) -> Result<(), Errno> {
        self.0.borrow_mut().turn(self.1, wait, completions);
        Ok(())
    }

    fn listeners(&self) -> usize {
        self.0.borrow().listeners_each()
    }

    fn accept(&mut self, listener: usize, multishot: bool) -> OpId {
        let listener = self.listener(listener);
        OpId::new(self.0.borrow_mut().accept(listener, multishot))
    }

    fn stop_listening(&mut self, listener: usize) {
        let listener = self.listener(listener);
        self.0.borrow_mut().stop_listening(listener);
    }

    fn connect(&mut self, conn: Key, address: SocketAddr) -> Result<(SimSocket, OpId), Errno> {
        let (socket, op) = self.0.borrow_mut().connect(self.1, conn, address)?;
        Ok((SimSocket(socket as u32), OpId::new(op)))
    }

    fn receive(&mut self, conn: Key, socket: SimSocket) -> OpId {
        OpId::new(self.0.borrow_mut().receive(self.1, conn, socket.0 as usize))
    }

    fn send(&mut self, conn: Key, socket: SimSocket, range: Lent, confirm: Confirm) -> OpId {
        let deferred = confirm == Confirm::Deferred;
        OpId::new(self.0.borrow_mut().send(self.1, conn, socket.0 as usize, range, deferred))
    }

    fn watch_hangup(&mut self, conn: Key, socket: SimSocket) -> OpId {
        OpId::new(self.0.borrow_mut().watch_hangup(self.1, conn, socket.0 as usize))
    }

    fn cancel(&mut self, op: OpId) {
        self.0.borrow_mut().cancel(self.1, op.number());
    }

    fn shutdown(&mut self, socket: SimSocket, half: Half) {
        self.0.borrow_mut().shutdown(self.1, socket.0 as usize, half);
    }

    fn close(&mut self, socket: SimSocket, how: Close) {
        self.0.borrow_mut().close(self.1, socket.0 as usize, how);
    }

    fn release(&mut self, socket: SimSocket) -> SimSocket {
        self.0.borrow_mut().release(self.1, socket.0 as usize);
        socket
    }

    fn adopt(&mut self, socket: SimSocket) -> SimSocket {
        self.0.borrow_mut().adopt(self.1, socket.0 as usize);
        socket
    }

    fn acknowledged(&self, socket: SimSocket) -> Option<u64> {
        Some(self.0.borrow().acknowledged(socket.0 as usize))
    }

    fn is_reset(&self, _socket: SimSocket) -> bool {
        false
    }

    fn peer(&self, _socket: SimSocket) -> Option<SocketAddr> {
        None
    }

    fn buffers_free(&self) -> usize {
        self.0.borrow().buffers_free(self.1)
    }
}
