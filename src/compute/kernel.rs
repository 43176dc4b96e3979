//! What a kernel is: one WGSL entry point, the bindings it has, and the CPU reference that specifies it.
//!
//! A shader file is valid WGSL as it stands. Its module-scope `const NAME: u32 = 64u;` lines are defaults: a dispatch may
//! specialise them by name (tile sizes, head size, weight format, fused epilogues) and the engine rewrites the line before
//! compilation. One mechanism serves workgroup sizes, workgroup arrays and private arrays, which `override` could not.
//!
//! Binding convention: `@group(0) @binding(0)` is the uniform `Params` struct, storage bindings follow from 1 in the order of
//! [`Kernel::bindings`].

use bytemuck::{Pod, Zeroable};

/// Whether a kernel only reads a storage binding or also writes it (`read` / `read_write` in WGSL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// One storage binding.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    /// The variable's name in WGSL and the parameter's name in the CPU reference.
    pub name: &'static str,
    pub access: Access,
}

/// One member of a params struct, for the test that compares it with the WGSL struct.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub name: &'static str,
    pub offset: usize,
}

/// A uniform params struct: `#[repr(C)]`, four-byte members only.
pub trait Params: Pod {
    const FIELDS: &'static [Field];
}

/// The params of a kernel that needs none; WGSL declares no binding 0 for it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct NoParams {}

impl Params for NoParams {
    const FIELDS: &'static [Field] = &[];
}

/// A storage binding as the CPU engine hands it to a reference: 32-bit words, typed by the reference.
pub enum Operand<'a> {
    Read(&'a [u32]),
    Write(&'a mut [u32]),
}

impl Operand<'_> {
    pub fn read<T: Pod>(&self) -> &[T] {
        match self {
            Operand::Read(words) => bytemuck::cast_slice(words),
            Operand::Write(words) => bytemuck::cast_slice(words),
        }
    }

    /// # Panics
    /// If the kernel declared the binding as read-only: a bug in the kernel's declaration.
    pub fn write<T: Pod>(&mut self) -> &mut [T] {
        match self {
            Operand::Read(_) => panic!("a read-only binding is written"),
            Operand::Write(words) => bytemuck::cast_slice_mut(words),
        }
    }
}

/// Runs a kernel's CPU reference on type-erased params and operands; written by the [`kernel!`](crate::kernel) macro.
pub type Reference = fn(&[u8], &mut [Operand<'_>]);

/// One WGSL entry point with its CPU reference.
pub struct Kernel {
    /// `<family>.<entry>`: the name in tests, benches and profiles. Two kernels that differ only in how they tile share it.
    pub name: &'static str,
    /// The shader file's stem.
    pub shader: &'static str,
    pub source: &'static str,
    pub entry: &'static str,
    pub bindings: &'static [Binding],
    pub fields: &'static [Field],
    pub params_size: usize,
    pub reference: Reference,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}.wgsl:{})", self.name, self.shader, self.entry)
    }
}

/// A module-scope WGSL constant set by a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    U32(u32),
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
    ($(#[$meta:meta])* pub struct $Name:ident { $($(#[$field_meta:meta])* pub $field:ident : $ty:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub struct $Name { $($(#[$field_meta])* pub $field: $ty),* }

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

/// Declares a [`Kernel`](crate::compute::kernel::Kernel): label, shader stem, entry point, params type, storage bindings in
/// order with access and element type, and the typed CPU reference `fn(&Params, bindings...)`.
///
/// ```ignore
/// kernel! {
///     /// Layer normalisation of every row.
///     pub static FORWARD = "layernorm.forward", "layernorm", "forward", ForwardParams,
///     [x: Read f32, gamma: Read f32, beta: Read f32, out: Write f32, stats: Write f32], forward_cpu
/// }
/// ```
#[macro_export]
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis static $NAME:ident = $label:literal, $shader:literal, $entry:literal, $params:ty,
     [$($binding:ident : $access:ident $ty:ty),* $(,)?], $reference:path) => {
        $(#[$meta])*
        $vis static $NAME: $crate::compute::kernel::Kernel = $crate::compute::kernel::Kernel {
            name: $label,
            shader: $shader,
            source: include_str!(concat!("../../shaders/", $shader, ".wgsl")),
            entry: $entry,
            bindings: &[
                $($crate::compute::kernel::Binding {
                    name: stringify!($binding),
                    access: $crate::compute::kernel::Access::$access,
                }),*
            ],
            fields: <$params as $crate::compute::kernel::Params>::FIELDS,
            params_size: std::mem::size_of::<$params>(),
            reference: {
                fn run(params: &[u8], operands: &mut [$crate::compute::kernel::Operand<'_>]) {
                    let params: $params = bytemuck::pod_read_unaligned(params);
                    let [$($binding),*] = operands else {
                        panic!("{} takes other bindings", $label)
                    };
                    $reference(&params, $($crate::kernel!(@operand $access $binding $ty)),*)
                }
                run
            },
        };
    };
    (@operand Read $binding:ident $ty:ty) => { $binding.read::<$ty>() };
    (@operand Write $binding:ident $ty:ty) => { $binding.write::<$ty>() };
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
