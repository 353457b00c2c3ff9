//! Load generator and fake backend.
