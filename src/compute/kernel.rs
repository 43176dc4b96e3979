//! What a kernel is: a [`Contract`], which says what is computed, and [`Variant`]s, the ways to run it on a device.
//!
//! The contract has the name, the params, the bindings, the specification in plain loops, and the CPU engine's function. A
//! variant is an entry point of some WGSL text with the conditions under which it may be launched and the workgroups it takes.
//! Launchers name contracts; which variant runs is decided when they are recorded, from the [`Profile`] of the device.
//!
//! A variant's text is the plain concatenation of files of `shaders/` and valid WGSL as it stands. Its module-scope
//! `const NAME: u32 = 64u;` lines are defaults: a variant sets them by name from the params (tile sizes, head size, weight
//! format, fused epilogues) and the engine rewrites the line before compilation. One mechanism serves workgroup sizes,
//! workgroup arrays and private arrays, which `override` could not.
//!
//! Binding convention: `@group(0) @binding(0)` is the uniform `Params` struct, storage bindings follow from 1 in the order of
//! [`Contract::bindings`].

use bytemuck::{Pod, Zeroable};

/// Whether a kernel only reads a storage binding or also writes it (`read` / `read_write` in WGSL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `read` in WGSL.
    Read,
    /// `read_write` in WGSL.
    Write,
}

/// One storage binding.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    /// The variable's name in WGSL and the parameter's name in the specification.
    pub name: &'static str,
    /// Whether the kernel writes it.
    pub access: Access,
}

/// One member of a params struct, for the test that compares it with the WGSL struct.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// As both structs have it.
    pub name: &'static str,
    /// In bytes, from the beginning of the struct.
    pub offset: usize,
}

/// A uniform params struct: `#[repr(C)]`, four-byte members only.
pub trait Params: Pod {
    /// The fields in their order, with their places in bytes.
    const FIELDS: &'static [Field];
}

/// The params of a kernel that needs none; WGSL declares no binding 0 for it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct NoParams {}

impl Params for NoParams {
    const FIELDS: &'static [Field] = &[];
}

/// A storage binding as it is handed to a [`Computation`]: 32-bit words, typed by the computation.
pub enum Operand<'a> {
    /// Of a binding with [`Access::Read`].
    Read(&'a [u32]),
    /// Of a binding with [`Access::Write`].
    Write(&'a mut [u32]),
}

impl Operand<'_> {
    /// The words, as the computation types them.
    pub fn read<T: Pod>(&self) -> &[T] {
        match self {
            Operand::Read(words) => bytemuck::cast_slice(words),
            Operand::Write(words) => bytemuck::cast_slice(words),
        }
    }

    /// The words to be written, as the computation types them.
    ///
    /// # Panics
    /// If the kernel declared the binding as read-only: a bug in the kernel's declaration.
    pub fn write<T: Pod>(&mut self) -> &mut [T] {
        match self {
            Operand::Read(_) => panic!("a read-only binding is written"),
            Operand::Write(words) => bytemuck::cast_slice_mut(words),
        }
    }
}

/// Computes a contract on type-erased params and operands; written by the [`contract!`](crate::contract) macro.
pub type Computation = fn(&[u8], &mut [Operand<'_>]);

/// What a kernel computes: its name, its operands and the specification that every way of running it is held against.
pub struct Contract {
    /// `<family>.<entry>`: the name in tests, benches and profiles.
    pub name: &'static str,
    /// The storage bindings, in order from 1.
    pub bindings: &'static [Binding],
    /// The members of the params struct.
    pub fields: &'static [Field],
    /// Bytes of the params struct.
    pub params_size: usize,
    /// The specification in plain loops. The browser's bundle has no use for it.
    #[cfg(not(target_arch = "wasm32"))]
    pub spec: Computation,
    /// How the CPU engine computes it: vectorised and on all cores where that pays.
    pub host: Computation,
    /// The ways to run it on a device, the preferred ones first. At least one fits every device that keeps WebGPU's defaults.
    pub variants: &'static [&'static Variant],
}

impl std::fmt::Debug for Contract {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Contract {
    /// The variant to run with `params` on the device of `profile`: the one that was tuned for where it fits, else the first
    /// that fits.
    ///
    /// # Panics
    /// If none fits: a bug in the family, which owes a variant to every device.
    pub fn choose(&self, profile: &Profile, params: &[u8]) -> &'static Variant {
        let fits = |variant: &&&'static Variant| profile.meets(&variant.needs) && (variant.fits)(profile, params);
        let preferred = profile
            .preferred
            .and_then(|name| self.variants.iter().filter(|v| v.name == name).find(fits));
        preferred
            .or_else(|| self.variants.iter().find(fits))
            .unwrap_or_else(|| panic!("{self:?} has no variant for a device of class {:?}", profile.class))
    }
}

/// A text of WGSL declarations, one file of `shaders/`.
#[derive(Clone, Copy)]
pub struct Part {
    /// The file's stem.
    pub stem: &'static str,
    /// The text of the file.
    pub source: &'static str,
}

/// What a variant asks of a device beyond nothing at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Abilities it has no replacement for.
    pub features: Features,
    /// Invocations in a workgroup.
    pub invocations: u32,
    /// Workgroup memory, in bytes.
    pub workgroup_bytes: u32,
}

impl Needs {
    /// What every WebGPU device has.
    pub const DEFAULT: Self = Self {
        features: Features::NONE,
        invocations: 256,
        workgroup_bytes: 16_384,
    };
}

/// Optional abilities of a device that a variant may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// `enable f16`: halves in arithmetic.
    pub shader_f16: bool,
    /// Subgroup operations.
    pub subgroups: bool,
}

impl Features {
    pub(crate) const NONE: Self = Self {
        shader_f16: false,
        subgroups: false,
    };

    fn include(self, needed: Self) -> bool {
        (self.shader_f16 || !needed.shader_f16) && (self.subgroups || !needed.subgroups)
    }
}

/// What kind of processor runs the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceClass {
    /// A real GPU: workgroup memory and barriers are cheap.
    Gpu,
    /// A Vulkan or WebGPU adapter emulated on the CPU (lavapipe, SwiftShader): register tiles win, barriers are emulated.
    CpuAdapter,
    /// This crate's CPU engine, which runs [`Contract::host`] and has no variants.
    CpuEngine,
}

/// What is known of a device when work for it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// What kind of processor it is.
    pub class: DeviceClass,
    /// Its optional abilities.
    pub features: Features,
    /// Largest workgroup, in invocations.
    pub invocations: u32,
    /// Workgroup memory, in bytes.
    pub workgroup_bytes: u32,
    /// The name of the variant to take wherever it fits; for tests and benches that hold variants against each other.
    pub preferred: Option<&'static str>,
}

impl Profile {
    /// A device of `class` with what WebGPU guarantees and no more.
    pub const fn of(class: DeviceClass) -> Self {
        Self {
            class,
            features: Features::NONE,
            invocations: Needs::DEFAULT.invocations,
            workgroup_bytes: Needs::DEFAULT.workgroup_bytes,
            preferred: None,
        }
    }

    /// Whether the device has what a variant needs.
    pub fn meets(&self, needs: &Needs) -> bool {
        self.features.include(needs.features)
            && needs.invocations <= self.invocations
            && needs.workgroup_bytes <= self.workgroup_bytes
    }
}

/// A way to run a contract on a device: an entry point in some WGSL text, and when and how it is launched.
pub struct Variant {
    /// What it computes.
    pub contract: &'static Contract,
    /// What sets it apart from the contract's other variants: `tiled`, `rows`, `vec4`.
    pub name: &'static str,
    /// The WGSL texts, which are concatenated in this order.
    pub parts: &'static [Part],
    /// The entry point in the WGSL text.
    pub entry: &'static str,
    /// What the device must have.
    pub needs: Needs,
    /// Whether it is right and reasonable for these params on this device.
    pub fits: fn(&Profile, &[u8]) -> bool,
    /// The WGSL constants that differ from their defaults for these params.
    pub constants: fn(&[u8]) -> Constants,
    /// Workgroups for these params.
    pub grid: fn(&[u8]) -> [u32; 3],
}

impl std::fmt::Debug for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.contract.name, self.name)
    }
}

impl Variant {
    /// The WGSL text with its default constants.
    pub fn source(&self) -> String {
        self.parts.iter().map(|part| part.source).collect::<Vec<_>>().join("\n")
    }
}

/// A module-scope WGSL constant set by a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// A `u32`.
    U32(u32),
    /// A `bool`.
    Bool(bool),
}

impl From<u32> for Constant {
    fn from(value: u32) -> Self {
        Constant::U32(value)
    }
}

impl From<bool> for Constant {
    fn from(value: bool) -> Self {
        Constant::Bool(value)
    }
}

/// The constants a dispatch sets; the others keep the default in the shader file.
pub type Constants = Vec<(&'static str, Constant)>;

/// The shader text with `constants` in place of its defaults.
///
/// # Panics
/// If the shader has no module-scope constant of that name and type: a bug in the launcher.
pub fn specialise(source: &str, constants: &[(&'static str, Constant)]) -> String {
    let mut text = source.to_owned();
    for (name, value) in constants {
        let (declaration, literal) = match value {
            Constant::U32(value) => (format!("const {name}: u32 = "), format!("{value}u")),
            Constant::Bool(value) => (format!("const {name}: bool = "), value.to_string()),
        };
        let start = text
            .find(&declaration)
            .unwrap_or_else(|| panic!("the shader has no `{declaration}`"))
            + declaration.len();
        let end = start + text[start..].find(';').expect("a WGSL constant ends with a semicolon");
        text.replace_range(start..end, &literal);
    }
    text
}

/// Declares a params struct: `#[repr(C)]`, plain data, with the offsets of its members for the layout test.
#[macro_export]
macro_rules! params {
    ($(#[$meta:meta])* $vis:vis struct $Name:ident { $($(#[$field_meta:meta])* pub $field:ident : $ty:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        $vis struct $Name { $($(#[$field_meta])* pub $field: $ty),* }

        impl $crate::compute::kernel::Params for $Name {
            const FIELDS: &'static [$crate::compute::kernel::Field] = &[
                $($crate::compute::kernel::Field {
                    name: stringify!($field),
                    offset: std::mem::offset_of!($Name, $field),
                }),*
            ];
        }
    };
}

/// The file `shaders/<stem>.wgsl` as a [`Part`](crate::compute::kernel::Part).
#[macro_export]
macro_rules! part {
    ($stem:literal) => {
        $crate::compute::kernel::Part {
            stem: $stem,
            source: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $stem, ".wgsl")),
        }
    };
}

/// Declares a [`Contract`](crate::compute::kernel::Contract): label, params type, storage bindings in order with access and
/// element type, the specification and the CPU engine's function, both `fn(&Params, bindings...)`, and the variants.
///
/// ```ignore
/// contract! {
///     /// Layer normalisation of every row.
///     pub static FORWARD = "layernorm.forward", ForwardParams,
///     [x: Read f32, gamma: Read f32, beta: Read f32, out: Write f32, stats: Write f32],
///     spec: spec::forward::<f32>, host: forward_host, variants: [FORWARD_TILED, FORWARD_ROWS]
/// }
/// ```
#[macro_export]
macro_rules! contract {
    ($(#[$meta:meta])* $vis:vis static $NAME:ident = $label:literal, $params:ty,
     [$($binding:ident : $access:ident $ty:ty),* $(,)?],
     spec: $spec:expr, host: $host:expr, variants: [$($variant:ident),* $(,)?] $(,)?) => {
        $(#[$meta])*
        $vis static $NAME: $crate::compute::kernel::Contract = $crate::compute::kernel::Contract {
            name: $label,
            bindings: &[
                $($crate::compute::kernel::Binding {
                    name: stringify!($binding),
                    access: $crate::compute::kernel::Access::$access,
                }),*
            ],
            fields: <$params as $crate::compute::kernel::Params>::FIELDS,
            params_size: std::mem::size_of::<$params>(),
            #[cfg(not(target_arch = "wasm32"))]
            spec: $crate::contract!(@erased $label, $params, [$($binding: $access $ty),*], $spec),
            host: $crate::contract!(@erased $label, $params, [$($binding: $access $ty),*], $host),
            variants: &[$(&$variant),*],
        };
    };
    (@erased $label:literal, $params:ty, [$($binding:ident : $access:ident $ty:ty),*], $function:expr) => {{
        fn run(params: &[u8], operands: &mut [$crate::compute::kernel::Operand<'_>]) {
            let params: $params = bytemuck::pod_read_unaligned(params);
            let [$($binding),*] = operands else {
                panic!("{} takes other bindings", $label)
            };
            $function(&params, $($crate::contract!(@operand $access $binding $ty)),*)
        }
        run
    }};
    (@operand Read $binding:ident $ty:ty) => { $binding.read::<$ty>() };
    (@operand Write $binding:ident $ty:ty) => { $binding.write::<$ty>() };
}

/// Declares a [`Variant`](crate::compute::kernel::Variant) of a contract: its name, WGSL files and entry point; `fits` says for
/// which device and params it may be chosen, `constants` which WGSL constants those params set, `grid` how many workgroups run.
/// What is left out is always, none, and [`Needs::DEFAULT`](crate::compute::kernel::Needs::DEFAULT).
///
/// ```ignore
/// variant! {
///     /// A workgroup a row.
///     static FORWARD_TILED = FORWARD, "tiled", ["layernorm"], "forward", ForwardParams,
///     fits: |profile, _| profile.class == DeviceClass::Gpu,
///     grid: |params| linear_workgroups(params.rows as usize, 1),
/// }
/// ```
#[macro_export]
macro_rules! variant {
    ($(#[$meta:meta])* $vis:vis static $NAME:ident = $CONTRACT:ident, $name:literal, [$($stem:literal),+ $(,)?],
     $entry:literal, $params:ty,
     $(needs: $needs:expr,)?
     $(fits: |$profile:pat_param, $fits_params:pat_param| $fits:expr,)?
     $(constants: |$constants_params:pat_param| $constants:expr,)?
     grid: |$grid_params:pat_param| $grid:expr $(,)?) => {
        $(#[$meta])*
        $vis static $NAME: $crate::compute::kernel::Variant = $crate::compute::kernel::Variant {
            contract: &$CONTRACT,
            name: $name,
            parts: &[$($crate::part!($stem)),+],
            entry: $entry,
            needs: $crate::variant!(@needs $($needs)?),
            fits: {
                #[allow(unused_variables)]
                fn fits(profile: &$crate::compute::kernel::Profile, params: &[u8]) -> bool {
                    $(
                        let params: $params = bytemuck::pod_read_unaligned(params);
                        let ($profile, $fits_params) = (profile, &params);
                        return $fits;
                    )?
                    #[allow(unreachable_code)]
                    true
                }
                fits
            },
            constants: {
                #[allow(unused_variables)]
                fn constants(params: &[u8]) -> $crate::compute::kernel::Constants {
                    $(
                        let params: $params = bytemuck::pod_read_unaligned(params);
                        let $constants_params = &params;
                        return $constants;
                    )?
                    #[allow(unreachable_code)]
                    Vec::new()
                }
                constants
            },
            grid: {
                fn grid(params: &[u8]) -> [u32; 3] {
                    let params: $params = bytemuck::pod_read_unaligned(params);
                    let $grid_params = &params;
                    $grid
                }
                grid
            },
        };
    };
    (@needs) => { $crate::compute::kernel::Needs::DEFAULT };
    (@needs $needs:expr) => { $needs };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specialise_replaces_only_the_named_constant() {
        let source = "const TILE: u32 = 64u;\nconst F16: bool = true;\nfn f() {}";
        let text = specialise(source, &[("F16", false.into())]);
        assert_eq!(text, "const TILE: u32 = 64u;\nconst F16: bool = false;\nfn f() {}");
    }

    #[test]
    #[should_panic(expected = "const ROWS: u32")]
    fn specialise_refuses_an_unknown_constant() {
        specialise("const TILE: u32 = 64u;", &[("ROWS", 3.into())]);
    }
}
