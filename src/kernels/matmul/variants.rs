//! The ways to run the products on a device: five for each contract, entry points of `shaders/matmul_tiled.wgsl`,
//! `matmul_registers.wgsl` and `matmul_decode.wgsl`, which share `matmul.wgsl` and end in the `store` of `matmul_store.wgsl` or
//! `matmul_store_gelu.wgsl`.

use super::{BACKWARD_X, FORWARD, FORWARD_GELU, ProductParams};
use crate::compute::kernel::Constants;
use crate::compute::{DeviceClass, Profile, linear_workgroups};
use crate::variant;

/// Rows and columns of `out` a workgroup of the tiled kernels computes, as `TILE` in the shader.
const TILE: u32 = 64;

/// Rows an invocation of the register kernels computes, as `REGISTER_ROWS` in the shader.
const REGISTER_ROWS: u32 = 8;

/// Invocations in a workgroup of the register kernels, as `REGISTER_LANES` in the shader.
const REGISTER_LANES: u32 = 8;

/// Columns a workgroup of the register kernels computes: 8 for each of its invocations.
const REGISTER_COLUMNS: u32 = 8 * REGISTER_LANES;

/// Most rows of the decode kernels.
const DECODE_ROWS: u32 = 4;

/// Invocations in a workgroup of `product_decode_registers`, as `DECODE_LANES` in the shader.
const DECODE_LANES: u32 = 8;

/// Columns a workgroup of the decode kernels computes, as `DECODE_COLUMNS` in the shader for a transposed weight; and 8 for each
/// octet of a row of a weight that is not.
const DECODE_COLUMNS: u32 = 4;
const DECODE_OCTET_COLUMNS: u32 = 32;

/// The constants of every variant.
fn product_constants(params: &ProductParams) -> Constants {
    let transposed = params.transposed != 0;
    let w_columns = if transposed { params.inner } else { params.columns };
    vec![
        ("W_FORMAT", params.format.into()),
        ("W_ALIGNED", w_columns.is_multiple_of(4).into()),
        ("W_TRANSPOSED", transposed.into()),
    ]
}

fn decode_constants(params: &ProductParams) -> Constants {
    let mut constants = product_constants(params);
    constants.push(("DECODE_ROWS", params.rows.clamp(1, DECODE_ROWS).into()));
    constants
}

fn registers_fit(profile: &Profile, _: &ProductParams) -> bool {
    profile.class == DeviceClass::CpuAdapter
}

fn decode_registers_fit(profile: &Profile, params: &ProductParams) -> bool {
    profile.class == DeviceClass::CpuAdapter && params.rows <= DECODE_ROWS
}

fn decode_fits(profile: &Profile, params: &ProductParams) -> bool {
    profile.class == DeviceClass::Gpu && params.rows <= DECODE_ROWS
}

fn vec4_fits(profile: &Profile, params: &ProductParams) -> bool {
    let quads = |size: u32| size.is_multiple_of(4);
    profile.class == DeviceClass::Gpu && quads(params.inner) && quads(params.x_first) && quads(params.x_stride)
}

fn tiled_grid(params: &ProductParams) -> [u32; 3] {
    [params.columns.div_ceil(TILE), params.rows.div_ceil(TILE), 1]
}

fn registers_grid(params: &ProductParams) -> [u32; 3] {
    [
        params.columns.div_ceil(REGISTER_COLUMNS),
        params.rows.div_ceil(REGISTER_ROWS),
        1,
    ]
}

fn decode_grid(params: &ProductParams) -> [u32; 3] {
    let columns = if params.transposed != 0 {
        DECODE_COLUMNS
    } else {
        DECODE_OCTET_COLUMNS
    };
    linear_workgroups(params.columns as usize, columns)
}

/// An invocation computes a column of a transposed weight, an octet of columns of another.
fn decode_registers_grid(params: &ProductParams) -> [u32; 3] {
    let columns = if params.transposed != 0 { 1 } else { 8 };
    linear_workgroups(params.columns.div_ceil(columns) as usize, DECODE_LANES)
}

/// The five variants of a contract, which are told apart by what follows the product: `$store` is the part with `fn store`.
macro_rules! products {
    ($CONTRACT:ident, $store:literal: $TILED:ident, $VEC4:ident, $REGISTERS:ident, $DECODE:ident, $DECODE_REGISTERS:ident) => {
        variant! {
            /// 64×64 tiles in workgroup memory, at every shape.
            pub(super) static $TILED = $CONTRACT, "tiled", ["weight", "matmul", $store, "matmul_tiled"], "product", ProductParams,
            constants: |params| product_constants(params),
            grid: |params| tiled_grid(params),
        }

        variant! {
            /// Tiles, activations loaded in fours.
            pub(super) static $VEC4 = $CONTRACT, "vec4", ["weight", "matmul", $store, "matmul_tiled"], "product_vec4", ProductParams,
            fits: |profile, params| vec4_fits(profile, params),
            constants: |params| product_constants(params),
            grid: |params| tiled_grid(params),
        }

        variant! {
            /// 8×8 values an invocation, without workgroup memory.
            pub(super) static $REGISTERS = $CONTRACT, "registers", ["weight", "matmul", $store, "matmul_registers"],
            "product_registers", ProductParams,
            fits: |profile, params| registers_fit(profile, params),
            constants: |params| product_constants(params),
            grid: |params| registers_grid(params),
        }

        variant! {
            /// At most 4 rows: the weight is read once.
            pub(super) static $DECODE = $CONTRACT, "decode", ["weight", "matmul", $store, "matmul_decode"], "product_decode",
            ProductParams,
            fits: |profile, params| decode_fits(profile, params),
            constants: |params| decode_constants(params),
            grid: |params| decode_grid(params),
        }

        variant! {
            /// At most 4 rows, without workgroup memory.
            pub(super) static $DECODE_REGISTERS = $CONTRACT, "decode_registers", ["weight", "matmul", $store, "matmul_decode"],
            "product_decode_registers", ProductParams,
            fits: |profile, params| decode_registers_fit(profile, params),
            constants: |params| decode_constants(params),
            grid: |params| decode_registers_grid(params),
        }
    };
}

products!(FORWARD, "matmul_store":
    FORWARD_TILED, FORWARD_VEC4, FORWARD_REGISTERS, FORWARD_DECODE, FORWARD_DECODE_REGISTERS);
products!(FORWARD_GELU, "matmul_store_gelu":
    FORWARD_GELU_TILED, FORWARD_GELU_VEC4, FORWARD_GELU_REGISTERS, FORWARD_GELU_DECODE, FORWARD_GELU_DECODE_REGISTERS);
products!(BACKWARD_X, "matmul_store":
    BACKWARD_X_TILED, BACKWARD_X_VEC4, BACKWARD_X_REGISTERS, BACKWARD_X_DECODE, BACKWARD_X_DECODE_REGISTERS);
