//! The allocator: its optima against brute force and a general convex solver, its promises, its extensions and its errors.

mod baselines;
mod brute;
mod exact;
mod extensions;
mod fixtures;
mod fuzz;
mod instances;
mod power_control;
mod scenario;
