// swift-tools-version: 6.1
import PackageDescription

let package = Package(
    name: "TaskSwitch",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "TaskSwitch", targets: ["TaskSwitch"]),
        .library(name: "PhoneBench", targets: ["PhoneBench"]),
        .executable(name: "phone-bench", targets: ["phone-bench"]),
    ],
    dependencies: [
        .package(path: ".."),
        .package(url: "https://github.com/ml-explore/mlx-swift-lm", from: "3.31.4"),
    ],
    targets: [
        .target(
            name: "TaskSwitch",
            dependencies: [
                .product(name: "D2CPack", package: "swift"),
                .product(name: "MLXLMCommon", package: "mlx-swift-lm"),
            ]
        ),
        .target(
            name: "PhoneBench",
            dependencies: ["TaskSwitch", .product(name: "MLXLLM", package: "mlx-swift-lm")]
        ),
        .executableTarget(name: "phone-bench", dependencies: ["PhoneBench"]),
    ]
)
