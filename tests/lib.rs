//! Shared by the test suites and by the coverage-guided fuzzer: the fuzz targets.

pub mod fuzz;

// By this name the sources of `shard` that are compiled in here find it.
use shard::io;
