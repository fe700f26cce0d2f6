// What mlx_swift.py compiles: a tiny model of mlx-swift-lm's protocols, and packs on it.
import D2CPack
import Foundation
import MLX
import MLXLMCommon
import MLXNN
import TaskSwitch

let (hidden, inner) = (32, 64)

final class Attention: Module {
    @ModuleInfo(key: "q_proj") var q = Linear(hidden, hidden, bias: false)
    @ModuleInfo(key: "k_proj") var k = Linear(hidden, hidden / 2, bias: false)
    @ModuleInfo(key: "v_proj") var v = Linear(hidden, hidden / 2, bias: false)
    @ModuleInfo(key: "o_proj") var o = Linear(hidden, hidden, bias: false)
}

final class MLP: Module {
    @ModuleInfo(key: "gate_proj") var gate = Linear(hidden, inner, bias: false)
    @ModuleInfo(key: "up_proj") var up = Linear(hidden, inner, bias: false)
    @ModuleInfo(key: "down_proj") var down = Linear(inner, hidden, bias: false)
}

final class Block: Module {
    @ModuleInfo(key: "self_attn") var attention = Attention()
    @ModuleInfo(key: "mlp") var mlp = MLP()
}

final class Blocks: Module { let layers = [Block(), Block()] }

/// The outputs of all modules, one after the other.
final class Tiny: Module, LanguageModel, LoRAModel {
    @ModuleInfo(key: "model") var model = Blocks()
    var loraLayers: [Module] { model.layers }

    var modules: [(path: String, linear: Linear, width: Int)] {
        model.layers.enumerated().flatMap { i, block in
            let (a, m) = (block.attention, block.mlp)
            return [
                ("self_attn.q_proj", a.q, hidden), ("self_attn.k_proj", a.k, hidden),
                ("self_attn.v_proj", a.v, hidden), ("self_attn.o_proj", a.o, hidden),
                ("mlp.gate_proj", m.gate, hidden), ("mlp.up_proj", m.up, hidden),
                ("mlp.down_proj", m.down, inner),
            ].map { ("model.layers.\(i).\($0.0)", $0.1, $0.2) }
        }
    }

    func callAsFunction(_ x: MLXArray, cache: [KVCache]?) -> MLXArray {
        concatenated(modules.map { $0.linear(x[0..., 0..<$0.width]).flattened() })
    }
    func newCache(parameters: GenerateParameters?) throws -> [KVCache] { [] }
    func prepare(
        _ input: LMInput, cache: [KVCache], state: LMOutput.State?, prefill: PrefillParameters
    ) throws -> PrepareResult { .tokens(input.text) }

    /// What an adapter adds, by the padded directory for mlx-lm.
    func change(_ x: MLXArray, _ directory: URL) throws -> MLXArray {
        let arrays = try loadArrays(url: directory.appendingPathComponent("adapters.safetensors"))
        return concatenated(modules.map { path, linear, width in
            guard let a = arrays[path + ".lora_a"], let b = arrays[path + ".lora_b"] else {
                return MLXArray.zeros([x.dim(0) * linear.shape.0])
            }
            return matmul(matmul(x[0..., 0..<width], a), b).flattened()
        })
    }
}

func json(_ url: URL) throws -> [String: Any] {
    try JSONSerialization.jsonObject(with: Data(contentsOf: url)) as? [String: Any] ?? [:]
}

/// Print the largest difference; it must be 0 where the numbers are to be the same.
func say(_ what: String, _ found: MLXArray, _ expected: MLXArray, same: Bool = true) {
    let off = abs(found - expected).max().item(Float.self)
    print(what, "off by", off)
    precondition((off == 0) == same, what)
}

func check(_ root: URL, _ model: Tiny, _ what: String) throws {
    let x = MLXRandom.normal([5, inner])
    let base = model(x, cache: nil)
    let names = try json(root.appendingPathComponent("mlx/tasks.json")) as? [String: String] ?? [:]
    let pack = try Pack(directory: root.appendingPathComponent("pack"))
    func expected(_ task: String?) throws -> MLXArray {
        guard let name = task.flatMap({ names[$0] }) else { return base }
        return base + (try model.change(x, root.appendingPathComponent("mlx/\(name)")))
    }
    let tasks = TaskSwitch(pack)
    for task in ["one", "two", "one", nil, "two", nil] {
        try tasks.serve(task, with: model)
        say("\(what), in place: \(task ?? "base")", model(x, cache: nil), try expected(task))
    }
    for (task, name) in names.sorted(by: <) {
        let url = root.appendingPathComponent("swift/\(name)")
        let container = try LoRAContainer.from(directory: url)
        try container.load(into: model)
        say("\(what), --to mlx-swift: \(task)", model(x, cache: nil), try expected(task))
        container.unload(from: model)
    }
    let both = try ["one", "two"].compactMap { try pack.adapter(for: $0).map(LoRAContainer.init) }
    for one in both { try one.load(into: model) }
    say("\(what), two over one", model(x, cache: nil), try expected("two"), same: false)
    for one in both { one.unload(from: model) }
    say("\(what), both unloaded", model(x, cache: nil), base)
}

@main struct Check {
    static func main() throws {
        let root = URL(fileURLWithPath: CommandLine.arguments[1])
        for bits in [nil, 4] as [Int?] {
            for storage in ["compact", "plain"] {
                let model = Tiny()
                if let bits { quantize(model: model, groupSize: 32, bits: bits) }
                let base = bits.map { "\($0) bit" } ?? "float"
                try check(root.appendingPathComponent(storage), model, "\(base) base, \(storage)")
            }
        }
    }
}
