//! A scripted backend: a listener whose connections the test answers itself.

use crate::message::Message;
use crate::peer::{Peer, is_timeout};
use crate::server::{SOON, own_address};
use socket2::{Domain, SockRef, Socket, Type};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

pub(crate) struct Backend {
    listener: TcpListener,
    pub(crate) address: SocketAddr,
}

impl Backend {
    pub(crate) fn listen() -> Backend {
        let address = SocketAddr::from((own_address(), 8000));
        Backend { listener: TcpListener::bind(address).unwrap(), address }
    }

    /// The next connection.
    #[track_caller]
    pub(crate) fn accept(&self) -> Peer {
        self.try_accept(SOON).expect("a connection from the proxy")
    }

    /// The next connection and the request on it.
    #[track_caller]
    pub(crate) fn request(&self) -> (Peer, Message) {
        let mut peer = self.accept();
        let request = peer.request();
        (peer, request)
    }

    /// None within that time.
    pub(crate) fn try_accept(&self, within: Duration) -> Option<Peer> {
        // SO_RCVTIMEO bounds accept(2) too.
        SockRef::from(&self.listener).set_read_timeout(Some(within)).unwrap();
        match self.listener.accept() {
            Ok((stream, _)) => Some(Peer::new(stream)),
            Err(error) if is_timeout(&error) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// No connection has come.
    #[track_caller]
    pub(crate) fn was_left_alone(&self) {
        assert!(self.try_accept(Duration::from_millis(20)).is_none(), "the backend was connected to");
    }

    /// Serves every connection on a thread of its own until the process ends.
    pub(crate) fn serve(self, talk: impl Fn(Peer) + Send + Sync + 'static) -> SocketAddr {
        let talk = std::sync::Arc::new(talk);
        std::thread::spawn(move || {
            SockRef::from(&self.listener).set_read_timeout(None).unwrap();
            for stream in self.listener.incoming() {
                let talk = talk.clone();
                std::thread::spawn(move || talk(Peer::new(stream.unwrap())));
            }
        });
        self.address
    }
}

/// A backend that never accepts: its queue is full, so connects hang.
pub(crate) struct BlackHole {
    _listener: Socket,
    _queued: Vec<TcpStream>,
    pub(crate) address: SocketAddr,
}

impl BlackHole {
    pub(crate) fn open() -> BlackHole {
        let address = SocketAddr::from((own_address(), 8000));
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&address.into()).unwrap();
        listener.listen(0).unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            queued.push(stream);
            assert!(queued.len() < 100, "a queue of none takes one or two");
        }
        BlackHole { _listener: listener, _queued: queued, address }
    }
}

/// An address where nothing listens.
pub(crate) fn nowhere() -> SocketAddr {
    SocketAddr::from((own_address(), 8000))
}
