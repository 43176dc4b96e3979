//! What every kernel promises without a GPU to test it on: its WGSL is portable, its declaration in Rust says what the WGSL
//! says, and every specialisation that a launcher asks for keeps to what its variant needs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use naga::valid::{Capabilities, GlobalUse, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess, TypeInner};
use sflllm::compute::kernel::{Access, Constants, DeviceClass, Needs, Profile, Variant, specialise};
use sflllm::compute::recording::Dispatch;
use sflllm::compute::{Command, Engine, Recording};
use sflllm::kernels::case::Sizes;
use sflllm::kernels::{self, scalar};

/// Of WebGPU's defaults; no variant may need more.
const MAX_STORAGE_BUFFERS: usize = 8;

/// WebGPU's core, of which `unpack2x16float` is a built-in, and what a variant needs beyond it.
fn capabilities(needs: &Needs) -> Capabilities {
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SHADER_FLOAT16, needs.features.shader_f16);
    capabilities.set(Capabilities::SUBGROUP, needs.features.subgroups);
    capabilities
}

/// Sizes that nothing divides, sizes that everything divides, and every head size that is treated apart.
fn sizes() -> Vec<Sizes> {
    let odd = Sizes {
        batch: 3,
        seq: 45,
        width: 70,
        heads: 5,
        kv_heads: 5,
        head_size: 14,
        ffn: 203,
        vocab: 301,
        rank: 3,
        ..Sizes::GPT2_SMALL
    };
    let even = Sizes {
        batch: 2,
        seq: 64,
        width: 128,
        heads: 4,
        kv_heads: 2,
        head_size: 32,
        ffn: 256,
        vocab: 512,
        rank: 16,
        ..Sizes::GPT2_SMALL
    };
    let heads = [2, 64, 80, 128, 256].map(|head_size| Sizes {
        width: head_size * even.heads,
        head_size,
        ..even
    });
    let one = Sizes {
        batch: 1,
        seq: 1,
        ..even
    };
    [odd, even, one].into_iter().chain(heads).collect()
}

/// Every launch of every example on a device. Nothing is run.
fn dispatches(profile: Profile) -> Vec<Dispatch> {
    let engine = Engine::paper();
    let mut recording = Recording::new(profile);
    for sizes in sizes() {
        for example in kernels::examples() {
            let case = example.build(&engine, sizes).expect("paper has room");
            case.record(&mut recording);
        }
    }
    recording
        .commands()
        .iter()
        .filter_map(|command| match command {
            Command::Dispatch(dispatch) => Some(dispatch.clone()),
            _ => None,
        })
        .collect()
}

/// Every variant as its files have it and in every specialisation that is launched, without repeats.
fn specialisations() -> Vec<(&'static Variant, Constants)> {
    let mut found: BTreeMap<String, (&'static Variant, Constants)> = BTreeMap::new();
    let mut add = |variant: &'static Variant, constants: Constants| {
        found.insert(format!("{variant:?} {constants:?}"), (variant, constants));
    };
    let variants: Vec<&'static Variant> = kernels::all()
        .flat_map(|contract| contract.variants.iter().copied())
        .collect();
    for variant in &variants {
        add(variant, vec![]);
    }
    let all_features = Profile {
        features: sflllm::compute::kernel::Features {
            shader_f16: true,
            subgroups: true,
        },
        ..Profile::of(DeviceClass::Gpu)
    };
    for profile in [
        Profile::of(DeviceClass::Gpu),
        Profile::of(DeviceClass::CpuAdapter),
        all_features,
    ] {
        for dispatch in dispatches(profile) {
            // What is not chosen first may be chosen by tuning.
            for variant in dispatch.contract.variants {
                if profile.meets(&variant.needs) && (variant.fits)(&profile, &dispatch.params) {
                    add(variant, (variant.constants)(&dispatch.params));
                }
            }
        }
    }
    found.into_values().collect()
}

/// A validated shader, with the uses of the entry point that `variant` names.
struct Shader {
    claim: String,
    variant: &'static Variant,
    module: Module,
    info: ModuleInfo,
    entry: usize,
}

impl Shader {
    fn parse(variant: &'static Variant, constants: &Constants) -> Self {
        let claim = format!("{variant:?} {constants:?}");
        let source = specialise(&variant.source(), constants);
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|error| panic!("{claim}: {}", error.emit_to_string(&source)));
        let info = Validator::new(ValidationFlags::all(), capabilities(&variant.needs))
            .validate(&module)
            .unwrap_or_else(|error| panic!("{claim}: {}", error.emit_to_string(&source)));
        let entry = module
            .entry_points
            .iter()
            .position(|entry| entry.name == variant.entry)
            .unwrap_or_else(|| panic!("{claim}: no such entry point"));
        Self {
            claim,
            variant,
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
        let Self { claim, variant, .. } = self;
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
            .zip(variant.contract.bindings)
            .map(|(i, binding)| (i, binding.access))
            .collect();
        assert_eq!(
            places, declared,
            "{claim}: WGSL uses {found:?}, Rust declares {:?}",
            variant.contract.bindings
        );
        assert!(places.len() <= MAX_STORAGE_BUFFERS, "{claim}");
    }

    fn assert_params_match(&self) {
        let Self { claim, variant, .. } = self;
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
        let fields: Vec<_> = variant.contract.fields.iter().map(|f| (f.name, f.offset)).collect();
        let declared = (variant.contract.params_size > 0).then_some((fields, variant.contract.params_size));
        assert_eq!(found, Vec::from_iter(declared), "{claim}: params");
    }

    fn assert_within_its_needs(&self) {
        let (claim, needs) = (&self.claim, self.variant.needs);
        let entry = &self.module.entry_points[self.entry];
        assert!(entry.workgroup_size_overrides.is_none(), "{claim}");
        assert!(
            entry.workgroup_size.iter().product::<u32>() <= needs.invocations,
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
            bytes <= needs.workgroup_bytes,
            "{claim}: {bytes} bytes of workgroup memory"
        );
    }

    /// naga takes some WGSL that browsers refuse.
    fn assert_portable(&self) {
        let Self { claim, variant, .. } = self;
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
        for line in variant.source().lines().map(str::trim_start) {
            assert!(
                !line.starts_with("enable ") && !line.starts_with("requires "),
                "{claim}: {line}"
            );
        }
    }
}

#[test]
fn every_variant_is_valid_portable_and_as_declared() {
    for (variant, constants) in specialisations() {
        let shader = Shader::parse(variant, &constants);
        shader.assert_bindings_match();
        shader.assert_params_match();
        shader.assert_within_its_needs();
        shader.assert_portable();
    }
}

#[test]
fn every_part_is_the_file_of_its_stem() {
    for contract in kernels::all() {
        for variant in contract.variants {
            for (i, part) in variant.parts.iter().enumerate() {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("shaders/{}.wgsl", part.stem));
                assert_eq!(
                    std::fs::read_to_string(path).unwrap(),
                    part.source,
                    "{variant:?}: part {i}"
                );
            }
        }
    }
}

#[test]
fn every_contract_has_a_variant_for_every_device_and_belongs_to_its_family() {
    let mut names = BTreeSet::new();
    for contract in kernels::all() {
        assert!(names.insert(contract.name), "{contract:?} is declared twice");
        let (family, _) = contract.name.split_once('.').expect("names are <family>.<entry>");
        let mut variants = BTreeSet::new();
        for variant in contract.variants {
            assert!(
                std::ptr::eq(variant.contract, contract),
                "{variant:?} is another contract's"
            );
            assert!(variants.insert(variant.name), "{variant:?} is declared twice");
            let own = variant.parts.last().expect("a variant has a text").stem;
            assert!(own.starts_with(family), "{variant:?} ends with {own}.wgsl");
        }
    }
}

#[test]
fn every_contract_is_launched_by_an_example_on_every_class_of_device() {
    for class in [DeviceClass::Gpu, DeviceClass::CpuAdapter] {
        let launched: BTreeSet<&str> = dispatches(Profile::of(class))
            .iter()
            .map(|dispatch| dispatch.contract.name)
            .collect();
        for contract in kernels::all().filter(|contract| !contract.name.starts_with("peak.")) {
            assert!(launched.contains(contract.name), "{contract:?} is in no example");
        }
    }
}

#[test]
fn every_entry_point_is_a_variant() {
    let mut entries: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for variant in kernels::all().flat_map(|contract| contract.variants) {
        let own = variant.parts.last().expect("a variant has a text").stem;
        entries.entry(own).or_default().insert(variant.entry);
    }
    for variant in kernels::all().flat_map(|contract| contract.variants) {
        let own = variant.parts.last().expect("a variant has a text").stem;
        for entry in &Shader::parse(variant, &vec![]).module.entry_points {
            // A variant's text has the entry points of all its parts.
            let mut known = variant.parts.iter().filter_map(|part| entries.get(part.stem));
            assert!(
                known.any(|entries| entries.contains(entry.name.as_str())),
                "{own}.wgsl: `{}` has no variant",
                entry.name
            );
        }
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let used: BTreeSet<&str> = kernels::all()
        .flat_map(|contract| contract.variants)
        .flat_map(|variant| variant.parts)
        .map(|part| part.stem)
        .collect();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert!(used.contains(stem), "shaders/{stem}.wgsl is in no variant");
    }
}

#[test]
fn shaders_and_rust_agree_where_each_scalar_lives() {
    let mut seen = 0;
    for variant in kernels::all().flat_map(|contract| contract.variants) {
        let Shader { module, .. } = Shader::parse(variant, &vec![]);
        for (_, constant) in module.constants.iter() {
            let Some(name) = constant.name.as_deref().and_then(|name| name.strip_prefix("SCALAR_")) else {
                continue;
            };
            let expected = scalar::INDICES
                .iter()
                .find(|(other, _)| *other == name)
                .unwrap_or_else(|| panic!("{variant:?}: scalar.rs has no {name}"))
                .1;
            let naga::Expression::Literal(naga::Literal::U32(found)) = module.global_expressions[constant.init] else {
                panic!("{variant:?}: SCALAR_{name} is a u32")
            };
            assert_eq!(found as usize, expected, "{variant:?}: SCALAR_{name}");
            seen += 1;
        }
        let reads = variant.contract.bindings.iter().any(|b| b.name == "scalars");
        assert!(
            !reads || variant.source().contains("const SCALAR_"),
            "{variant:?} reads scalars by number"
        );
    }
    assert!(seen > 0);
    assert!(scalar::INDICES.iter().all(|&(_, i)| i < scalar::COUNT));
}
