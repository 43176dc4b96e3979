//! The ways to run attention on a device: tiles of tokens through workgroup memory, or an invocation a token.

use super::{BACKWARD_DOT, BACKWARD_KV, BACKWARD_Q, FORWARD, Params};
use crate::compute::kernel::Constants;
use crate::compute::{DeviceClass, linear_workgroups};
use crate::variant;

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Queries and keys in a tile, the default of `TILE` in the shader.
const TILE: u32 = 32;

/// Invocations in a workgroup of the `_rows` entry points, the default of `ROWS_WORKGROUP` in the shader.
const ROWS_WORKGROUP: u32 = 8;

fn aligned(params: &Params) -> bool {
    params.head_size.is_multiple_of(4)
}

fn tiled_constants(params: &Params) -> Constants {
    vec![
        ("HEAD_SLICES", params.head_size.div_ceil(32).into()),
        ("ALIGNED", aligned(params).into()),
    ]
}

fn rows_constants(params: &Params) -> Constants {
    vec![
        ("HEAD_QUADS", params.head_size.div_ceil(4).into()),
        ("ALIGNED", aligned(params).into()),
    ]
}

/// A workgroup a tile of tokens in each of `heads` heads.
fn tiled_grid(params: &Params, heads: u32) -> [u32; 3] {
    [params.seq.div_ceil(TILE), heads, params.batch]
}

/// An invocation a token in each of `heads` heads.
fn rows_grid(params: &Params, heads: u32) -> [u32; 3] {
    linear_workgroups(params.rows() * heads as usize, ROWS_WORKGROUP)
}

variant! {
    /// An invocation a query.
    pub(super) static FORWARD_ROWS = FORWARD, "rows", ["attention"], "forward_rows", Params,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    constants: |params| rows_constants(params),
    grid: |params| rows_grid(params, params.heads),
}

variant! {
    /// A workgroup a tile of queries, which walks over the tiles of keys before it.
    pub(super) static FORWARD_TILED = FORWARD, "tiled", ["attention"], "forward", Params,
    constants: |params| tiled_constants(params),
    grid: |params| tiled_grid(params, params.heads),
}

variant! {
    /// An invocation a head of a row.
    pub(super) static BACKWARD_DOT_ROWS = BACKWARD_DOT, "rows", ["attention"], "backward_dot", Params,
    grid: |params| linear_workgroups(params.rows() * params.heads as usize, WORKGROUP),
}

variant! {
    /// An invocation a query.
    pub(super) static BACKWARD_Q_ROWS = BACKWARD_Q, "rows", ["attention"], "backward_q_rows", Params,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    constants: |params| rows_constants(params),
    grid: |params| rows_grid(params, params.heads),
}

variant! {
    /// A workgroup a tile of queries.
    pub(super) static BACKWARD_Q_TILED = BACKWARD_Q, "tiled", ["attention"], "backward_q", Params,
    constants: |params| tiled_constants(params),
    grid: |params| tiled_grid(params, params.heads),
}

variant! {
    /// An invocation a key, which walks over the queries of every head that reads it.
    pub(super) static BACKWARD_KV_ROWS = BACKWARD_KV, "rows", ["attention"], "backward_kv_rows", Params,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    constants: |params| rows_constants(params),
    grid: |params| rows_grid(params, params.kv_heads),
}

variant! {
    /// A workgroup a tile of keys, which walks over the tiles of queries of every head that reads them.
    pub(super) static BACKWARD_KV_TILED = BACKWARD_KV, "tiled", ["attention"], "backward_kv", Params,
    constants: |params| tiled_constants(params),
    grid: |params| tiled_grid(params, params.kv_heads),
}
