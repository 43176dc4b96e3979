//! What every kernel promises without a GPU to test it on: its WGSL is portable, its declaration in Rust says what the WGSL
//! says, and every specialisation that a launcher asks for keeps to the WebGPU default limits.

use std::collections::BTreeMap;

use naga::valid::{Capabilities, GlobalUse, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess, TypeInner};
use sflllm::compute::kernel::{Access, Constants, Kernel, specialise};
use sflllm::compute::{Buffer, Command, DeviceClass, Engine, Recording};
use sflllm::kernels::{
    self, adamw, aggregate, attention, cross_entropy, embedding, gelu, layernorm, lora, matmul, peak, quantize,
    residual, scalar,
};

/// WebGPU's defaults, which every adapter has.
const MAX_INVOCATIONS: u32 = 256;
const MAX_WORKGROUP_BYTES: u32 = 16_384;
const MAX_STORAGE_BUFFERS: usize = 8;

/// What WebGPU has without optional features: `unpack2x16float` is one of its core built-ins.
const CORE: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

/// (rows, inputs, outputs, rank): one with odd sizes, one with sizes of a real model.
const MATRICES: [(usize, usize, usize, u32); 2] = [(45, 70, 301, 3), (512, 768, 2304, 16)];

/// Records every launcher at several shapes, formats and fusions. Buffers are tiny: nothing is run.
fn record_all(recording: &mut Recording) {
    let engine = Engine::cpu();
    let make = || engine.buffer("word", 1).expect("one word");
    let words: [Buffer; 9] = std::array::from_fn(|_| make());
    let [a, b, c, d, e, f, g, h, i] = &words;
    peak::multiply_add(recording, a);
    residual::accumulate(recording, 301, a, b);
    gelu::forward(recording, 301, a, b);
    gelu::backward_x(recording, 301, a, b, c);
    let mean = aggregate::Params { n: 301, clients: 3 };
    aggregate::mean(recording, mean, a, b, c);
    adamw::norm(recording, 301, a, b, c);
    adamw::update(recording, 301, a, b, (c, d, e));
    let tensor = quantize::Params { rows: 45, width: 70 };
    quantize::forward_f16(recording, tensor, a, b);
    quantize::inverse_f16(recording, tensor, a, b);
    quantize::forward_int8(recording, tensor, a, b, c);
    quantize::inverse_int8(recording, tensor, a, b, c);
    let rows = layernorm::ForwardParams {
        rows: 45,
        width: 70,
        epsilon: 1e-5,
    };
    layernorm::forward(recording, rows, a, (b, c), d, e);
    for accumulate in [0, 1] {
        let rows = layernorm::BackwardParams {
            rows: 45,
            width: 70,
            accumulate,
        };
        layernorm::backward_x(recording, rows, a, (b, c, d), e);
    }
    for head_size in [1, 14, 64, 80, 128, 256] {
        let params = attention::Params {
            batch: 2,
            seq: 45,
            heads: 5,
            head_size,
            scale: 1.0,
        };
        attention::forward(recording, params, a, b, c);
        attention::backward(recording, params, (a, b, c), d, e, f);
    }
    for f16 in [false, true] {
        let params = embedding::ForwardParams {
            rows: 45,
            seq: 45,
            width: 70,
            vocab_start: 0,
            vocab_end: 301,
            f16: f16.into(),
        };
        embedding::forward(recording, params, a, b, c, d);
        for (m, k, n, rank) in MATRICES {
            let shape = matmul::Shape::new(m, n, k);
            for epilogue in epilogues(rank, [d, e, f, g, h, i]) {
                matmul::forward(recording, shape, f16, a, b, c, epilogue);
                if epilogue.gelu_pre.is_none() {
                    matmul::backward_x(recording, shape, f16, a, b, c, epilogue);
                }
            }
            matmul::backward_w(recording, shape, a, b, c, 1.0);
            record_lora(recording, (m, k, n, rank), &words);
            for d_hidden in [None, Some(e)] {
                let head = cross_entropy::Head {
                    rows: m,
                    width: k,
                    tile: n - 1,
                    f16,
                    hidden: a,
                    chunks: &[(b.clone(), 0, n as u32), (b.clone(), n as u32, n as u32 + 7)],
                    targets: c,
                    scalars: d,
                    scratch: cross_entropy::Scratch {
                        logits: f,
                        state: g,
                        row_scale: h,
                    },
                    loss: i,
                    d_hidden,
                };
                cross_entropy::record(recording, &head);
            }
        }
    }
}

fn epilogues(rank: u32, [a, b, c, d, e, f]: [&Buffer; 6]) -> Vec<matmul::Epilogue<'_>> {
    let none = matmul::Epilogue::default();
    let lora = matmul::Lora {
        u: a,
        adapter: b,
        offset: 0,
        rank,
        scale: 2.0,
    };
    let mut all = vec![none];
    for lora in [None, Some(lora)] {
        all.push(matmul::Epilogue {
            bias: Some(c),
            residual: Some(d),
            lora,
            ..none
        });
        all.push(matmul::Epilogue {
            bias: Some(c),
            gelu_pre: Some(e),
            lora,
            ..none
        });
        all.push(matmul::Epilogue {
            row_scale: Some(f),
            lora,
            ..none
        });
        all.push(matmul::Epilogue {
            accumulate: true,
            lora,
            ..none
        });
    }
    all
}

fn record_lora(
    recording: &mut Recording,
    (rows, inputs, outputs, rank): (usize, usize, usize, u32),
    words: &[Buffer; 9],
) {
    let [a, b, c, d, e, ..] = words;
    let (rows, inputs, outputs, offset) = (rows as u32, inputs as u32, outputs as u32, 5);
    let down = lora::ForwardDownParams {
        rows,
        inputs,
        rank,
        offset,
    };
    lora::forward_down(recording, down, a, b, c);
    let up = lora::BackwardUpParams {
        rows,
        outputs,
        rank,
        offset,
    };
    lora::backward_up(recording, up, a, b, c);
    let of_b = lora::BackwardBParams {
        rows,
        outputs,
        rank,
        offset,
        scale: 2.0,
    };
    lora::backward_b(recording, of_b, a, b, c, d, e);
    let of_a = lora::BackwardAParams {
        rows,
        inputs,
        rank,
        offset,
        scale: 2.0,
    };
    lora::backward_a(recording, of_a, a, b, c, d, e);
}

/// Every dispatch of every launcher, with the tilings of both classes.
fn launched() -> Vec<(&'static Kernel, Constants)> {
    [DeviceClass::Gpu, DeviceClass::CpuAdapter]
        .into_iter()
        .flat_map(|class| {
            let mut recording = Recording::new(class);
            record_all(&mut recording);
            recording
                .commands()
                .iter()
                .filter_map(|command| match command {
                    Command::Dispatch(dispatch) => Some((dispatch.kernel, dispatch.constants.clone())),
                    _ => None,
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Every kernel as its shader file has it and in every launched specialisation, without repeats.
fn variants() -> Vec<(&'static Kernel, Constants)> {
    let mut variants: BTreeMap<String, (&'static Kernel, Constants)> = BTreeMap::new();
    let defaults = kernels::all().map(|kernel| (kernel, vec![]));
    for (kernel, constants) in defaults.chain(launched()) {
        variants.insert(format!("{kernel:?} {constants:?}"), (kernel, constants));
    }
    variants.into_values().collect()
}

/// A validated shader, with the uses of the entry point that `kernel` names.
struct Shader {
    claim: String,
    kernel: &'static Kernel,
    module: Module,
    info: ModuleInfo,
    entry: usize,
}

impl Shader {
    fn parse(kernel: &'static Kernel, constants: &Constants) -> Self {
        let claim = format!("{kernel:?} {constants:?}");
        let source = specialise(kernel.source, constants);
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|error| panic!("{claim}: {}", error.emit_to_string(&source)));
        // Neither subgroups nor f16 nor anything else beyond the core.
        let info = Validator::new(ValidationFlags::all(), CORE)
            .validate(&module)
            .unwrap_or_else(|error| panic!("{claim}: {}", error.emit_to_string(&source)));
        let entry = module
            .entry_points
            .iter()
            .position(|entry| entry.name == kernel.entry)
            .unwrap_or_else(|| panic!("{claim}: no such entry point"));
        Self {
            claim,
            kernel,
            module,
            info,
            entry,
        }
    }

    /// The module-scope variables that the entry point uses, in a given sort of address space.
    fn used(&self, wanted: impl Fn(AddressSpace) -> bool) -> impl Iterator<Item = (&naga::GlobalVariable, GlobalUse)> {
        self.module
            .global_variables
            .iter()
            .filter(move |(_, variable)| wanted(variable.space))
            .map(|(handle, variable)| (variable, self.info.get_entry_point(self.entry)[handle]))
            .filter(|(_, usage)| !usage.is_empty())
    }

    fn assert_bindings_match(&self) {
        let Self { claim, kernel, .. } = self;
        let mut found: Vec<(u32, Access, Option<&str>)> = self
            .used(|space| matches!(space, AddressSpace::Storage { .. }))
            .map(|(variable, usage)| {
                let AddressSpace::Storage { access } = variable.space else {
                    unreachable!("filtered")
                };
                let writable = access.contains(StorageAccess::STORE);
                assert_eq!(
                    writable,
                    usage.contains(GlobalUse::WRITE),
                    "{claim}: {:?} is read_write and not written",
                    variable.name
                );
                let binding = variable.binding.expect("a storage variable is bound");
                assert_eq!(binding.group, 0, "{claim}: {:?}", variable.name);
                let access = if writable { Access::Write } else { Access::Read };
                (binding.binding, access, variable.name.as_deref())
            })
            .collect();
        found.sort_by_key(|&(binding, ..)| binding);
        let places: Vec<_> = found.iter().map(|&(i, access, _)| (i, access)).collect();
        let declared: Vec<_> = (1..)
            .zip(kernel.bindings)
            .map(|(i, binding)| (i, binding.access))
            .collect();
        assert_eq!(
            places, declared,
            "{claim}: WGSL uses {found:?}, Rust declares {:?}",
            kernel.bindings
        );
        assert!(places.len() <= MAX_STORAGE_BUFFERS, "{claim}");
    }

    fn assert_params_match(&self) {
        let Self { claim, kernel, .. } = self;
        let found: Vec<_> = self
            .used(|space| space == AddressSpace::Uniform)
            .map(|(variable, _)| {
                let binding = variable.binding.expect("a uniform is bound");
                assert_eq!((binding.group, binding.binding), (0, 0), "{claim}");
                let TypeInner::Struct { members, span } = &self.module.types[variable.ty].inner else {
                    panic!("{claim}: params are a struct")
                };
                let members: Vec<(&str, usize)> = members
                    .iter()
                    .map(|member| {
                        let name = member.name.as_deref().expect("WGSL names members");
                        (name, member.offset as usize)
                    })
                    .collect();
                (members, *span as usize)
            })
            .collect();
        let fields: Vec<_> = kernel.fields.iter().map(|f| (f.name, f.offset)).collect();
        let declared = (kernel.params_size > 0).then_some((fields, kernel.params_size));
        assert_eq!(found, Vec::from_iter(declared), "{claim}: params");
    }

    fn assert_within_default_limits(&self) {
        let claim = &self.claim;
        let entry = &self.module.entry_points[self.entry];
        assert!(entry.workgroup_size_overrides.is_none(), "{claim}");
        assert!(
            entry.workgroup_size.iter().product::<u32>() <= MAX_INVOCATIONS,
            "{claim}: {:?} invocations",
            entry.workgroup_size
        );
        let bytes: u32 = self
            .used(|space| space == AddressSpace::WorkGroup)
            .map(|(variable, _)| {
                let inner = &self.module.types[variable.ty].inner;
                inner.size(self.module.to_ctx()).next_multiple_of(16)
            })
            .sum();
        assert!(
            bytes <= MAX_WORKGROUP_BYTES,
            "{claim}: {bytes} bytes of workgroup memory"
        );
    }

    /// naga takes some WGSL that browsers refuse.
    fn assert_portable(&self) {
        let Self { claim, kernel, .. } = self;
        for (_, function) in self.module.functions.iter() {
            for argument in &function.arguments {
                if let TypeInner::Pointer { space, .. } = self.module.types[argument.ty].inner {
                    assert!(
                        matches!(space, AddressSpace::Function | AddressSpace::Private),
                        "{claim}: {:?} takes a pointer to {space:?}",
                        function.name
                    );
                }
            }
        }
        assert!(self.module.overrides.is_empty(), "{claim}: overrides");
        for line in kernel.source.lines().map(str::trim_start) {
            assert!(
                !line.starts_with("enable ") && !line.starts_with("requires "),
                "{claim}: {line}"
            );
        }
    }
}

#[test]
fn every_variant_is_valid_portable_and_as_declared() {
    for (kernel, constants) in variants() {
        let shader = Shader::parse(kernel, &constants);
        shader.assert_bindings_match();
        shader.assert_params_match();
        shader.assert_within_default_limits();
        shader.assert_portable();
    }
}

#[test]
fn every_kernel_is_launched_by_its_family() {
    let launched = launched();
    for kernel in kernels::all() {
        assert!(
            launched
                .iter()
                .any(|(other, _)| (other.shader, other.entry) == (kernel.shader, kernel.entry)),
            "{kernel:?} is in no launcher"
        );
    }
    for (kernel, _) in launched {
        assert!(
            kernels::all().any(|other| std::ptr::eq(kernel, other)),
            "{kernel:?} is not in its family's ALL"
        );
    }
}

#[test]
fn every_entry_point_is_a_kernel_of_its_family() {
    let mut entries = BTreeMap::new();
    for kernel in kernels::all() {
        assert!(
            kernel.name.starts_with(&format!("{}.", kernel.shader)),
            "{kernel:?}: names are <family>.<entry>"
        );
        let first = entries.insert((kernel.shader, kernel.entry), kernel);
        assert!(first.is_none(), "{kernel:?} is declared twice");
    }
    for kernel in kernels::all() {
        for entry in &Shader::parse(kernel, &vec![]).module.entry_points {
            assert!(
                entries.contains_key(&(kernel.shader, entry.name.as_str())),
                "{}.wgsl: `{}` has no kernel",
                kernel.shader,
                entry.name
            );
        }
    }
}

#[test]
fn shaders_and_rust_agree_where_each_scalar_lives() {
    let mut seen = 0;
    for kernel in kernels::all() {
        let Shader { module, .. } = Shader::parse(kernel, &vec![]);
        for (_, constant) in module.constants.iter() {
            let Some(name) = constant.name.as_deref().and_then(|name| name.strip_prefix("SCALAR_")) else {
                continue;
            };
            let expected = scalar::INDICES
                .iter()
                .find(|(other, _)| *other == name)
                .unwrap_or_else(|| panic!("{kernel:?}: scalar.rs has no {name}"))
                .1;
            let naga::Expression::Literal(naga::Literal::U32(found)) = module.global_expressions[constant.init] else {
                panic!("{kernel:?}: SCALAR_{name} is a u32")
            };
            assert_eq!(found as usize, expected, "{kernel:?}: SCALAR_{name}");
            seen += 1;
        }
        let reads = kernel.bindings.iter().any(|b| b.name == "scalars");
        assert!(
            !reads || kernel.source.contains("const SCALAR_"),
            "{kernel:?} reads scalars by number"
        );
    }
    assert!(seen > 0);
    assert!(scalar::INDICES.iter().all(|&(_, i)| i < scalar::COUNT));
}
