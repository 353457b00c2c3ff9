//! Which shard a durable stream belongs to: a hash of its path, which never changes between builds, since journals are laid out
//! by it (docs/decisions/016-spread-of-durable-streams.md). Forks live with their sources; their paths' shards know where.

/// Of FNV-1a, 64 bits.
const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// The shard, of so many, that a path belongs to: FNV-1a over its bytes, mixed by the finalizer of splitmix64, because the low
/// bits of FNV-1a hang on the low bits of the bytes alone.
pub fn home_of(path: &str, shards: usize) -> usize {
    let hash = path.bytes().fold(OFFSET_BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((hash ^ (hash >> 31)) % shards.max(1) as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data directories are laid out by them.
    #[test]
    fn homes_never_change() {
        let homes = |path| [1, 2, 3, 4, 8, 64].map(|shards| home_of(path, shards));
        assert_eq!(homes("/v1/durable/a"), [0, 1, 2, 3, 7, 55]);
        assert_eq!(homes("/v1/durable/room/42"), [0, 1, 2, 1, 1, 9]);
    }

    #[test]
    fn paths_of_every_shape_are_spread() {
        let shapes: [fn(usize) -> String; 4] = [
            |n| format!("/v1/durable/{n}"),
            |n| format!("/v1/durable/user-{n}/session-{n}"),
            |n| format!("/v1/durable/{n:032x}"),
            |n| format!("/v1/durable/{}", "x".repeat(n % 200 + 1) + &(n / 200).to_string()),
        ];
        for (nth, shape) in shapes.iter().enumerate() {
            for shards in [2, 3, 4, 7, 16] {
                let mut share = vec![0; shards];
                (0..8000).for_each(|n| share[home_of(&shape(n), shards)] += 1);
                let fair = 8000 / shards;
                let even = share.iter().all(|&share| share > fair * 8 / 10 && share < fair * 12 / 10);
                assert!(even, "shape {nth} on {shards} shards: {share:?}");
            }
        }
    }
}
