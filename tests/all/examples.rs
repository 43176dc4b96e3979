//! The examples do what they say, on this machine.

#[path = "../../examples/allocation.rs"]
mod allocation;
#[path = "../../examples/kernels.rs"]
mod kernels;
#[path = "../../examples/sessions.rs"]
mod sessions;
#[path = "../../examples/train.rs"]
mod train;

#[test]
fn a_scenario_is_solved() {
    allocation::main().unwrap();
}

#[test]
fn every_kernel_is_right_on_this_machine() {
    kernels::main().unwrap();
}

#[test]
fn three_machines_train_and_average_in_one_process() {
    sessions::main().unwrap();
}

#[test]
fn a_model_trains_on_one_device() {
    train::main().unwrap();
}
